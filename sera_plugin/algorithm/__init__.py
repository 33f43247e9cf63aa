"""The method. Read this first: `algorithm`, then `rewards`, `fit`, `selection`.

Arrays and tables in, arrays and tables out: no torch, no host, no engine.

- `algorithm`   Algorithm 1 on one screen, then its phases
- `rewards`     Eq. 7 and length control; `selection`  which pairs are kept, which are made
- `fit`         the reward that held-out labels fit; `trust`  whether an iteration follows it
- `method`      the method's constants and steps, and what is asked of samplers, scorers, labelers
- `noise`       by how much rounding moves a margin
- `summary`     what an iteration did; `alarms`  what to worry about
"""
