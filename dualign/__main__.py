"""`python -m dualign` is the command `dualign`."""

from __future__ import annotations

import sys

from dualign.command import main

if __name__ == "__main__":
    sys.exit(main())
