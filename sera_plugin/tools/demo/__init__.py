"""A world small enough for a CPU in which the true reward of every response is known.

- `world`       prompts, true reward, corrupted demonstrations, noisy and length-biased labels
- `base_model`  a small language model trained from scratch on the demonstrations
- `run`         `axolotl sera demo`: base model, preference pairs, `axolotl train`, a table
"""
