"""Every op in plain, obvious torch ops: the fallback, and the truth that tests compare with.

Nothing here waits for the device, except where `nonfinite` is RAISE, in what searches histograms,
in bags of embeddings, and in the layers that quantize their input at each call. Signatures are
the schemas' (`csrc/library.cpp`); what each op means is written in `docs/architecture.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .basics import (
    choose_qparams,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_with_mask,
    fused_observe_fake_quantize,
    fused_observe_fake_quantize_with_mask,
    learnable_fake_quantize,
    learnable_fake_quantize_backward,
    observe_channel_histograms_,
    observe_histogram_,
    observe_minmax_,
    observe_qparams_,
    quantize_per_channel,
    search_histogram_range,
)
from .batch_norm import (
    batch_norm_fake_quantize,
    batch_norm_fake_quantize_backward,
    observe_batch_norm_,
)
from .clamped_sum import add_observe_fake_quantize
from .convolution import convolution, convolution_backward
from .dynamic import DYNAMIC_OPS
from .errors import observe_error_
from .folded_weight import fold_weight, fold_weight_backward, observe_folded_weight_
from .quantized import QUANTIZED_OPS
from .quantized_embedding import QUANTIZED_EMBEDDINGS
from .quantized_norms import QUANTIZED_NORMS
from .ranges import histogram_error, histogram_range, least_error_range

OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        observe_minmax_,
        observe_histogram_,
        observe_channel_histograms_,
        observe_qparams_,
        observe_error_,
        search_histogram_range,
        histogram_range,
        least_error_range,
        histogram_error,
        choose_qparams,
        fake_quantize,
        fake_quantize_with_mask,
        fake_quantize_backward,
        quantize_per_channel,
        fused_observe_fake_quantize,
        fused_observe_fake_quantize_with_mask,
        observe_batch_norm_,
        batch_norm_fake_quantize,
        batch_norm_fake_quantize_backward,
        add_observe_fake_quantize,
        observe_folded_weight_,
        fold_weight,
        fold_weight_backward,
        convolution,
        convolution_backward,
        learnable_fake_quantize,
        learnable_fake_quantize_backward,
        *QUANTIZED_OPS,
        *QUANTIZED_NORMS,
        *DYNAMIC_OPS,
        *QUANTIZED_EMBEDDINGS,
    )
}

# Those without CUDA kernels: CUDA tensors take the fallback, or, to search a range, go to the CPU.
ONLY_ON_CPU = frozenset(
    op.__name__
    for op in (
        observe_channel_histograms_,
        observe_error_,
        histogram_range,
        least_error_range,
        histogram_error,
        convolution,
        convolution_backward,
        *QUANTIZED_OPS,
        *QUANTIZED_NORMS,
        *DYNAMIC_OPS,
        *QUANTIZED_EMBEDDINGS,
    )
)
