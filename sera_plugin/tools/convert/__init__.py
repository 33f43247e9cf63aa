"""`axolotl sera convert`: a LLaMA-Factory DPO YAML as an Axolotl YAML for `rl: sera`.

- `names`     LLaMA-Factory's defaults and templates; keys that become nothing, and why
- `settings`  the YAML being read, the YAML being written, and what there is to say about both
- `keys`      the table: which key becomes what
- `values`, `data`  the rows of the table that take more than a new name
- `convert`   all of it in order
"""
