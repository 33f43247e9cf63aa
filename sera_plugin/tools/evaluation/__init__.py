"""Win rates of trained models on a set of prompts: `axolotl sera eval`.

- `prompts`, `models`   what is asked, and who is
- `answers`, `engine`   their answers, sampled once
- `winrate`   win rates, errors, intervals; the same with the length of answers held equal
- `results`   figures, tables and the page
- `run`, `command`   one evaluation from end to end, and the command line
"""
