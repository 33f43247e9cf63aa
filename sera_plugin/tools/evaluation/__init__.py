"""Win rates of trained models on a set of prompts: `axolotl sera eval`.

- `models`   who is asked
- `answers`, `engine`   what they are asked and what they answer, sampled once
- `winrate`   win rates, errors, intervals; the same with the length of answers held equal
- `results`   figures, tables and the page
- `run`, `command`   one evaluation from end to end, and the command line
"""
