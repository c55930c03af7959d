"""`python -m pipelines`."""

import os
import sys

try:
    from pipelines.cli import main

    code = main()
except KeyboardInterrupt:  # during the imports, which take a second or two
    code = 130
sys.stdout.flush()
sys.stderr.flush()
if code == 130:
    # Threads of Ray may still be in C++ when Ctrl-C comes, and crash an orderly interpreter exit.
    os._exit(code)
sys.exit(code)
