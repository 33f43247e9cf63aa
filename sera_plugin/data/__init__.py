"""Rows of any shape to exact token ids, or a named reason why not.

- `files`   the user's files: why one cannot be loaded, whether it was edited since
- `rows`, `templates`, `texts`   a raw row to prompt, chosen and rejected text
- `encoding`, `dataset`   text to token ids; what is dropped, and why

`host/datasets.py` loads, merges and splits the rows in between, with the host's functions.
"""
