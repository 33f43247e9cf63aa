"""What needs the model: one forward pass, and everything that is made of it.

- `forward`, `budget`   one pass, and how much is put into it
- `scoring`   log-probabilities under any policy, on any number of ranks
- `policies`   policies by number; snapshots of weights, whole, sharded or PEFT's
- `losses`   what a step optimises, and the check before an iteration's first
"""
