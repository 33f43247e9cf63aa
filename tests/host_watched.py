"""`axolotl train` with a watch for lost ranks whose limits are those of a test, in seconds."""

import os
import sys

from axolotl.cli.train import do_cli

from sera_plugin.rundir import machines

if __name__ == "__main__":
    machines.BEAT, machines.LIMIT = 1.0, float(os.environ["WATCH_LIMIT"])
    do_cli(sys.argv[1])
