"""The run directory: a public format (docs/run-directory.md), and what keeps it whole.

- `store`        its files, each written beside and renamed into place
- `writing`      how a file is written: beside its place, and never through a link
- `checksums`    what is whole, and where a run continues
- `journal`      JSON lines that only grow, for calls that cost money
- `tokens`       lists of token ids as flat arrays
- `ranks`        the same in several processes
- `machines`     several machines: storage that all see, and a watch for a lost process
- `progress`     how far a phase is: a bar, or lines in a log
"""
