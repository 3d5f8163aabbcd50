from collections.abc import Callable
from typing import Any

from torch import Tensor

def isa() -> str: ...
def isas() -> list[str]: ...
def built_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def quantize(
    x: int,
    scale: int,
    out: int,
    outer: int,
    channels: int,
    inner: int,
    quant_min: int,
    quant_max: int,
    /,
) -> None: ...
def set_up_fast_calls(
    exchange_api: object,
    tensor_types: tuple[type, ...],
    guards: tuple[Callable[[], Any], ...],
    is_neg: Callable[[Tensor], bool],
    empty_like: Callable[[Tensor], Tensor],
    empty_bytes: Callable[[int], Tensor],
    /,
) -> None: ...
def observe_minmax(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    ch_axis: int | None,
    averaging_constant: float | None,
    nonfinite: int,
    /,
) -> bool | None: ...
def observe_histogram(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    upsample_rate: int,
    nonfinite: int,
    /,
) -> bool | None: ...
def histogram_qparams(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    eps: Tensor,
    dst_nbins: int,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
    scale: Tensor,
    zero_point: Tensor,
    /,
) -> bool | None: ...
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    enabled: Tensor | None,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    with_mask: bool,
    /,
) -> Tensor | tuple[Tensor, Tensor] | None: ...
def observe_fake_quantize(
    x: Tensor,
    observer_enabled: Tensor,
    fake_quant_enabled: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    nonfinite_count: Tensor,
    eps: Tensor,
    ch_axis: int | None,
    averaging_constant: float | None,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
    nonfinite: int,
    with_mask: bool,
    /,
) -> Tensor | tuple[Tensor, Tensor] | None: ...
def mask_gradient(grad: Tensor, mask: Tensor, stride: tuple[int, ...], /) -> Tensor | None: ...
