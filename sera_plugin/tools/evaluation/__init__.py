"""Win rates, checks and implicit rewards of trained models: `axolotl sera eval`.

- `models`   who is asked
- `answers`, `chat`, `engine`   what they are asked and answer, sampled once; for other judges
- `winrate`   win rates, errors, intervals; the same with the length of answers held equal
- `checks`   answers that a function checks one by one
- `rewards`, `scores`, `accuracy`   pairs that implicit rewards rank, scored once; figures and page
- `results`, `tables`   figures, tables and the page
- `run`, `command`   one evaluation from end to end, and the command line
"""
