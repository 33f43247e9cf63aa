"""What a run did to its data, for people: `axolotl sera report`, `inspect` and `compare`.

Everything here reads the run directory and writes one file; nothing of it is needed to train.

- `reading`   a run as arrays, its token ids as text; what is missing or damaged is named
- `figures`   the numbers: what `--json` prints
- `output`   texts and tables that are safe to show, in a terminal or on a page
- `charts`, `page`   the HTML page; its words are in `page.html`
- `pairs`   pairs one by one: to read, under every policy, and as a dataset
- `compare`   runs side by side
- `commands`   the command line
"""
