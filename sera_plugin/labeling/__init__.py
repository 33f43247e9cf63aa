"""Who ranks a prompt's candidates.

- `labelers`   the implicit reward, SeRA's own; SPIN; a judge; the policy in words
- `judging`    judges: a reward model, an API, a function
"""
