"""`python -m fastblocks` is the `fastblocks` command."""

import sys

from fastblocks.cli import main

sys.exit(main())
