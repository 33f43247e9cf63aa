"""The crash test: a run that is killed and continued equals one that was never interrupted.

Every run is the real host in a process of its own and dies of a real SIGKILL.
`python -m tests.crash --help` runs the long form; tests/test_crash.py a short one.
"""
