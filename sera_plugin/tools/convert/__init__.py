"""`axolotl sera convert`: a LLaMA-Factory DPO YAML as an Axolotl YAML for `rl: sera`.

- `convert`   the table of keys, and the conversion: read this first
- `rules`     what becomes of keys that are more than renamed
- `data`      datasets and their rows
- `settings`  the YAML being read; LLaMA-Factory's defaults, templates and keys that become nothing
"""
