"""What quantization did to a model: which layer is to blame, and what helps.

analysis = fastquant.analysis.analyze(float_model, prepared, data)
print(analysis)
"""

from .analyzing import analyze
from .errors import AnalysisError
from .result import Analysis, Clipping, LayerReport, OutputReport, Sensitivity, WeightReport
from .search import Assignment, search

__all__ = [
    "Analysis",
    "AnalysisError",
    "Assignment",
    "Clipping",
    "LayerReport",
    "OutputReport",
    "Sensitivity",
    "WeightReport",
    "analyze",
    "search",
]
