"""One GPU, a few minutes: is the plugin right in bf16 there, and how quick is it?

`python -m benchmarks.gpu --out DIR`. Nothing is downloaded or installed, the plugin's entry points
are not needed, and what a step has found is on disk as soon as the step ends.
"""
