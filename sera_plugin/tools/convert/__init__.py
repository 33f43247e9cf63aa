"""`axolotl sera convert`: a LLaMA-Factory DPO YAML as an Axolotl YAML for `rl: sera`.

- `settings`   the YAML being read, the YAML being written, and what there is to say about both
- `keys`       the table: which key becomes what
- `left_out`   keys that become nothing, and why
- `model`, `training`   the rows of the table that take more than a new name
- `templates`  LLaMA-Factory's templates that the host has too
- `data`, `rows`   `dataset_info.json`; rows that have to be written anew
- `convert`    all of it in order
"""
