"""`python -m sera_plugin ...`: the same commands without the host, whose banner goes to stdout."""

from sera_plugin.cli import sera

sera(prog_name="python -m sera_plugin")
