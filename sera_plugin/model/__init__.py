"""What needs the model: one forward pass, and everything that is made of it.

- `forward`, `packing`, `budget`, `memory`   one pass, and how much is put into it
- `logprobs`, `scoring`, `sharding`   log-probabilities under any policy, on any number of ranks
- `policies`, `adapters`   snapshots of policies; PEFT
- `losses`, `objective`, `gate`   the losses, the step, and the check before an iteration's first
"""
