"""`python -m fastquant.bench`."""

import sys

from . import main

sys.exit(main())
