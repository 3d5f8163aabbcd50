"""Quantized tensors: their class, and what torch's functions do with them."""

from . import comparing as comparing
from . import elementwise as elementwise
from . import pooling as pooling
from . import rearranging as rearranging
from . import resizing as resizing
