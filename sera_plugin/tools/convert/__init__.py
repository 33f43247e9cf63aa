"""`axolotl sera convert`: a LLaMA-Factory DPO YAML as an Axolotl YAML for `rl: sera`.

- `names`     LLaMA-Factory's defaults and templates; keys that become nothing, and why
- `settings`  the YAML being read, the YAML being written, and what a rule is
- `model`, `training`, `data`  the rules: which keys become what
- `convert`   all of it in order
"""
