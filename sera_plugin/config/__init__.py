"""What a YAML may say: the `sera:` block, the judge's, and what SeRA does with the host's keys.

- `sera`      the `sera:` block, frozen, and what SeRA does with keys that are the host's
- `kinds`     the losses, selections and labelers by name, a line each
- `labelers`  a function's block, and labelers that are mixed
- `block`     a block parsed, and what is wrong with one; that of a judge behind an API
- `quoting`   values of a YAML or a row as messages quote them: escaped and cut
"""
