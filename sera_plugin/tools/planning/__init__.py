"""What a run will need, before it starts: `axolotl sera plan`.

- `model`   a model's sizes and activations, from its class built of fake tensors
- `run`   a configuration with its model and data; bytes on the device and in host memory by phase
- `placement`   what each of many processes holds, and what lies in host memory
- `counts`   pairs, steps, tokens, operations and seconds of each iteration; bytes in output_dir
- `measure`   a short real run, timed
- `prepare`   a plan from a YAML, with the host's own parsing and data
- `show`   all figures, for people and for machines; what to change where it does not fit
"""
