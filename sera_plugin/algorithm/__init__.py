"""The method. Read this first: `algorithm`, then `rewards`, `selection`, `pairing`.

Arrays and tables in, arrays and tables out: no torch, no host, no engine.

- `algorithm`   Algorithm 1 on one screen; `offline`  its half on the dataset's own pairs
- `rewards`     Eq. 7; `selection`  which offline pairs are kept; `pairing`  pairs of samples
- `length_control`, `label_noise`, `dataset_scores`   variants and experiments
- `method`      the method's constants; `schedule`  steps of iterations of unequal length
- `protocols`   what is asked of samplers and labelers
- `summary`     what an iteration did; `alarms`  what to worry about
"""
