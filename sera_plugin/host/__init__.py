"""Axolotl alone: everything that touches the host.

- `plugin`   the host's public hooks
- `trainer`   construction; `epochs`, `continuing`, `step`   private seams, each pinned by a test
- `patches`   what is replaced in the host's modules, and when that may go
- `loop`, `run`   the iterations of one run in order; which run this is
- `config`   what `rl: sera` becomes; `refused`, `data_config`   what a YAML may not say
"""
