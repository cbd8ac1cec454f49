"""The command line as a module: `python -m starflow` is `starflow`."""

from __future__ import annotations

import sys

from starflow.cli.main import main

if __name__ == "__main__":  # worker processes import this file again
    sys.exit(main())
