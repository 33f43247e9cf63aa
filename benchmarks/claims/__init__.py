"""The paper's claims, run again in a world where the true reward is known; docs/claims.md.

world     the world and its parameters, fixed before anything was compared
criteria  what those parameters were fixed by: baselines alone
systems   every system and every sweep, as lines of YAML
runs      runs through the real host, each in a process of its own, as many as there are cores
measure   what is measured of a run
claims    each claim as a difference of two systems, and the rule for its verdict
charts    pictures
page      docs/claims.md between its markers, made of the kept results alone
real      the same questions to a dataset and a model of yours

`python -m benchmarks.claims --help` runs it.
"""
