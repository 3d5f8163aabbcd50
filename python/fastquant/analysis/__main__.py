"""`python -m fastquant.analysis`."""

import sys

from .command_line import main

sys.exit(main())
