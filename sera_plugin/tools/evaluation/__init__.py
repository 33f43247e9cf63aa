"""Win rates of trained models on a set of prompts: `axolotl sera eval`.

- `prompts`, `models`   what is asked, and who is
- `answers`, `engine`   their answers, sampled once
- `verdicts`   what a judge (`sera_plugin.labeling.judging`) says of them
- `winrate`   win rates, standard errors, intervals, categories
- `length`    the same with the length of answers held equal
- `results`, `page`   figures, tables and the page
- `run`, `command`   one evaluation from end to end, and the command line
"""
