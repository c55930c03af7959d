"""`python -m pipelines`."""

import errno
import os
import signal
import sys

# `ray job stop`, batch systems and Kubernetes end a command like this; it ends as by Ctrl-C.
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    from pipelines.cli import main

    code = main()
    sys.stdout.flush()
except (KeyboardInterrupt, SystemExit) as left:
    if isinstance(left, SystemExit) and left.code in (None, 0):  # --help
        raise
    # During the imports, which take a second or two; or as Ray's own handler, in force while Ray
    # starts, answers SIGTERM.
    print("stopped; what is finished is kept, the same command continues", file=sys.stderr)
    code = 130
except OSError as error:  # of stdout: the storage tells those of files as UserError
    if error.errno not in (errno.EPIPE, errno.ENOSPC):
        raise
    print(f"failed: stdout: {error.strerror}; the same command continues", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python fails once more at its end
    code = 1
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # too late: what is left is Ray's and Python's own end
sys.stderr.flush()
if code == 130:
    # Threads of Ray may still be in C++ when Ctrl-C comes, and crash an orderly interpreter exit.
    os._exit(code)
sys.exit(code)
