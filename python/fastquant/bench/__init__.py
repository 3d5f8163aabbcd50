"""What observers, fake-quantize and int8 cost on a model, compared with torch.ao.

    python -m fastquant.bench                         # a small CNN
    python -m fastquant.bench resnet18 --mode qat     # torchvision's, where it is installed
    python -m fastquant.bench my_package.my_module:build --input 8x3x224x224

The model is timed in float, prepared by fastquant, and prepared by torch.ao, in turn; then
each layer's observers. Beforehand, both prepared models see the same input once and must have
observed the same ranges. `run` does the same from Python.

    python -m fastquant.bench resnet18 --mode int8

times the converted model instead: with fastquant's own modules and with torch.ao's. `run_int8`
does that from Python.
"""

from .command_line import main
from .errors import BenchError
from .int8 import Int8Report, run_int8
from .measure import MODES, QCONFIGS, run
from .models import small_cnn, torchvision_model
from .report import Layer, Report
from .steps import Step, fused

__all__ = [
    "MODES",
    "QCONFIGS",
    "BenchError",
    "Int8Report",
    "Layer",
    "Report",
    "Step",
    "fused",
    "main",
    "run",
    "run_int8",
    "small_cnn",
    "torchvision_model",
]
