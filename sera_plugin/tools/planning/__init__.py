"""What a run will need, before it starts: `axolotl sera plan`.

- `shape`   a model as sizes of its weights and layers
- `counts`   pairs, steps, sequences and tokens of each iteration
- `compute`   floating-point operations of each phase, and seconds at a known speed
- `memory`   bytes on the device and in host memory, phase by phase
- `disk`   bytes that the run leaves in output_dir
- `advice`   what to change where it does not fit
- `prepare`   all of that from a YAML, with the host's own parsing and data
- `empty_model`   the shape from config.json, without a weight
- `measure`   a short real run, timed
- `show`, `commands`   the command line

Only `prepare`, `empty_model` and `measure` know the host and torch; the others are arithmetic.
"""
