"""``python -m ranvier`` is the command ``ranvier``."""

from __future__ import annotations

import sys

from ranvier.cli import main

if __name__ == "__main__":
    sys.exit(main())
