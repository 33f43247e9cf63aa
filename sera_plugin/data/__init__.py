"""Rows of any shape to exact token ids, or a named reason why not.

- `files`   the user's files: why one cannot be loaded, whether it was edited since
- `rows`   a raw row to prompt, chosen and rejected text
- `conversations`   messages to such text, through a chat template
- `marks`   whether what a row says is in its text
- `dataset`   text to token ids; what is dropped, and why

`host/datasets.py` loads, merges and splits the rows in between, with the host's functions.
"""
