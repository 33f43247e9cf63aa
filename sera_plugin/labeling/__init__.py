"""Who ranks a prompt's candidates.

- `labelers`   the labeler of one run
- `ranker`     what most have in common; the implicit reward, SeRA's own, and SPIN
- `judged`     by a judge: `judging` has a reward model, an API and a function
- `self_judge` the policy in words
- `conversation`   token ids to texts and back
"""
