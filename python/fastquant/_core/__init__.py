"""Leaves: what every other room builds on, and that imports none of them."""

from pathlib import Path

from .installation import require_own_files

# Here because every other module imports this package first.
require_own_files(Path(__file__).parents[1])
