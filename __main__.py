"""`python -m bakeoff`: the command line."""

import sys

from .cli import main

sys.exit(main())
