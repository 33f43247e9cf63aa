"""Axolotl alone: all that training has to do with the host.

- `plugin`   the host's public hooks; `config`  what `rl: sera` becomes
- `refused`  the table of what a YAML may not say; `datasets`  the pairs, for `load_datasets`
- `trainer`, `step`, `epochs`  construction and the private seams, pinned by a test
- `patches`  what must be patched, and what would remove each patch
- `restart`  an optimizer begun anew in place
- `loop`, `run`  the iterations of one run in order; which run this is, and what the log says
- `ends`, `errors`   the first and last words of `axolotl train`; how it ends at a mistake
- `base`     the base model's weights: those that the run began with
"""
