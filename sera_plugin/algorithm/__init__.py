"""The method. Read this first: `algorithm`, then `rewards`, `selection`, `pairing`.

Arrays and tables in, arrays and tables out: no torch, no host, no engine.

- `algorithm`   Algorithm 1 on one screen; `offline`  its half on the dataset's own pairs;
  `iteration`  what its steps work with
- `rewards`     Eq. 7; `selection`  which offline pairs are kept; `pairing`  pairs of samples
- `length_control`, `annotations`   variants, and what a dataset says of its pairs
- `method`      the method's constants; `schedule`  steps of iterations of unequal length
- `protocols`   what is asked of samplers and labelers
- `summary`     what an iteration did; `alarms`  what to worry about
"""
