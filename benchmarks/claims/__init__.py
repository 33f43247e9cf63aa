"""The paper's claims, run again in a world where the true reward is known; docs/claims.md.

world     the worlds and their parameters, fixed before anything was compared
tasks     what is asked in them, and what a good answer is; language has a real model's
criteria  what those parameters were fixed by: baselines alone
systems   every system and every sweep, as lines of YAML
runs      runs through the real host, each in a process of its own, as many as there are cores
measure   what is measured of a run; labelled where labelled pairs are held out
estimates figures of runs, differences over seeds, and the rule for a verdict
claims    each claim as such differences
tables    the page's tables, charts its pictures, page the page itself
real      the same questions to a dataset and a model of yours; real_tables shows the answers

`python -m benchmarks.claims --help` runs it.
"""
