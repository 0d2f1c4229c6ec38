"""`python -m cveff` is the command `cveff`."""

from __future__ import annotations

import sys

from cveff.cli import main

sys.exit(main())
