"""The native side: the library, its ops, their gradients and the routes to them."""

from . import fake_kernels as fake_kernels
from . import traced as traced
