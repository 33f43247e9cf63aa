"""Measurements of what the plugin costs and saves; `make bench` runs them (see docs/benchmarks.md).

Every part is a module with `TITLE`, `measure(setup) -> dict` (raw figures that JSON can hold) and
`table(result) -> str` (the Markdown made of them, and of nothing else).
"""
