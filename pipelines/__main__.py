"""`python -m pipelines`."""

import os
import signal
import sys

# `ray job stop`, batch systems and Kubernetes end a command like this; it ends as by Ctrl-C.
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    from pipelines.cli import main

    code = main()
except KeyboardInterrupt:  # during the imports, which take a second or two
    print("stopped; nothing was begun", file=sys.stderr)
    code = 130
sys.stdout.flush()
sys.stderr.flush()
if code == 130:
    # Threads of Ray may still be in C++ when Ctrl-C comes, and crash an orderly interpreter exit.
    os._exit(code)
sys.exit(code)
