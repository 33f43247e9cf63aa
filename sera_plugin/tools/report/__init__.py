"""What a run did to its data, for people: `axolotl sera report`, `inspect` and `compare`.

Everything here reads the run directory and writes one file; nothing of it is needed to train.

- `data`, `reading`   a run as arrays; what is missing or damaged is named
- `tokens`   token ids as text, with a tokenizer that is on this machine
- `figures`, `agreement`, `ensemble`   the numbers: what `--json` prints
- `examples`   which pairs are worth reading
- `charts`   the pictures, as SVG that takes the page's colours
- `blocks`, `about_data`, `about_training`   the page's sections
- `html`, `page`   the HTML page
- `pairs`, `inspection`, `export`   pairs one by one: under every policy, and as a dataset
- `compare`   runs side by side
- `terminal`, `commands`   the command line
"""
