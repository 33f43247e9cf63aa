"""Who ranks a prompt's candidates.

- `labelers`   the labeler of one run; `ranker`  what most have in common
- `implicit`   the implicit reward, SeRA's own
- `judged`     by a judge: `judging` has a reward model, an API and a function
- `self_judge` the policy in words; `spin`  the dataset's answer before samples
- `conversation`   token ids to messages
"""
