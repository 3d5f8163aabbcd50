"""What quantization did to a model: which layer is to blame, and what helps.

    analysis = fastquant.analysis.analyze(float_model, prepared, data)
    print(analysis)
    analysis.to_html("report.html")

`python -m fastquant.analysis module:build --data module:loader` does the same from a shell.
"""

from .analyzing import analyze
from .equalization import equalize
from .errors import AnalysisError
from .repairs import Repair, correct_bias, reestimate_batch_norm
from .result import Analysis, Clipping, LayerReport, OutputReport, Sensitivity, WeightReport
from .search import Assignment, search

__all__ = [
    "Analysis",
    "AnalysisError",
    "Assignment",
    "Clipping",
    "LayerReport",
    "OutputReport",
    "Repair",
    "Sensitivity",
    "WeightReport",
    "analyze",
    "correct_bias",
    "equalize",
    "reestimate_batch_norm",
    "search",
]
