"""Win rates of trained models on a set of prompts: `axolotl sera eval`.

- `winrate`   win rates, standard errors, intervals, categories
- `length`    the same with the length of answers held equal
"""
