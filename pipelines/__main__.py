"""`python -m pipelines`."""

import sys

try:
    from pipelines.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # during the imports, which take a second or two
    sys.exit(130)
