"""What people run by hand, all under `axolotl sera`.

- `report`      what a run did to its data; `compare` and `inspect` too
- `sharing`     what it leaves for others: card, hub
- `evaluation`  which policy gives better answers
- `planning`    what a run will take, before it starts
- `convert`     a YAML that comes from LLaMA-Factory; `schema`  what an editor knows of a YAML
- `paper`       the configurations of the paper's runs
- `demo`        a small world with a known true reward
- `command`     what the commands have in common
"""
