"""What a run will need, before it starts: `axolotl sera plan`.

- `model`   a model's sizes and activations, from its class built of fake tensors
- `counts`   pairs, steps, sequences and tokens of each iteration
- `run`   a configuration with both
- `memory`, `disk`   bytes on the device and in host memory by phase, and in output_dir
- `advice`   what to change where it does not fit
- `plan`   all figures, with operations and seconds
- `measure`   a short real run, timed
- `prepare`   a plan from a YAML, with the host's own parsing and data
- `show`, `commands`   the command line
"""
