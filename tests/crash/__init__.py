"""The crash test: a run that is killed and continued equals one that was never interrupted.

Every run is the real host in a process of its own and dies of a real SIGKILL.

    child     what happens inside a run: where it is, what it does, and its death
    compare   what a run left behind, in what two runs differ, what was done twice
    points    kinds of training, where to kill them, one point from start to verdict; starts runs

`python -m tests.crash --help` runs the long form; tests/test_crash.py a short one.
"""
