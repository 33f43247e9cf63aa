"""Rows of any shape to exact token ids, or a named reason why not.

- `rows`, `fields`, `templates`, `texts`   a raw row to prompt, chosen and rejected text
- `encoding`, `dataset`   text to token ids; what is dropped, and why
- `load_errors`   why a dataset cannot be loaded; `json_rows`  JSON lines that people write
- `edited_files`  which local files are newer than what was prepared from them
- `edited_files`   whether prepared data is older than the files it was made of

`host/datasets.py` loads, merges and splits the rows in between, with the host's functions.
"""
