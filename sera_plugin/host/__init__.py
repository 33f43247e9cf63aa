"""Axolotl alone: everything that touches the host.

- `plugin`   the host's public hooks; `trainer`  the private seams, each pinned by a test
- `loop`, `run`   the iterations of one run in order; which run this is
- `config`   what `rl: sera` becomes; `refused`, `data_config`   what a YAML may not say
"""
