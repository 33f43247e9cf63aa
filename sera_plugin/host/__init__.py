"""Axolotl alone: everything that touches the host.

- `plugin`     the host's public hooks; `datasets`  the pairs, for the hook `load_datasets`
- `config`     what `rl: sera` becomes; `refused`, `data_config`  what a YAML may not say
- `trainer`    construction; `epochs`, `continuing`, `step`  the private seams, pinned by a test
- `patches`    what must be patched, and what would remove each patch
- `loop`, `run`, `iteration_log`  the iterations of one run in order; which run this is; its log
"""
