"""Repairs that need no training, each with its measured effect: biases and batch norms.

Cross-layer equalization, which comes before prepare, is in `equalization.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..fake_quantize import FakeQuantizeBase, disable_observer
from .analyzing import Forward, Subject
from .errors import AnalysisError
from .measuring import channel_axis
from .reading import core, is_prepared
from .simulation import FLOAT, QUANTIZED, Site
from .sums import OutputError

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Repair:
    """A repaired model, and what the repair did.

    Attributes:
        model: the repaired copy.
        changed: names of the layers that were changed.
        before: SQNR of the quantized model's output without the repair, in dB.
        after: the same with it, on the same data.
    """

    model: nn.Module
    changed: tuple[str, ...]
    before: float
    after: float


def quality(subject: Subject) -> float:
    """SQNR of the output of a subject's model with all layers quantized, in dB."""
    error = OutputError()
    simulation = subject.simulation
    with torch.no_grad():
        for batch in subject.data:
            simulation.set(FLOAT)
            exact = subject.run(simulation.model, batch)
            simulation.set(QUANTIZED)
            error.add(exact, simulation.run(subject.run, batch))
    simulation.set(FLOAT)
    return error.sqnr


class _ChannelMeans:
    """The mean of each channel of a layer's outputs, before an activation that is fused with it."""

    def __init__(self, site: Site) -> None:
        self._axis = channel_axis(site)
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, output: Tensor) -> None:
        """Count an output."""
        channels = output.detach().double().movedim(self._axis, 0).flatten(1)
        self._sum = self._sum + channels.sum(1)
        self._count += channels.shape[1]

    def mean(self) -> Tensor:
        """One element per channel."""
        return torch.as_tensor(self._sum) / self._count


def _means(
    subject: Subject, batches: Iterable[Any], sites: Iterable[Site]
) -> dict[str, _ChannelMeans]:
    """Channel means of the layers in the present state of the model, and their order of calls."""
    means: dict[str, _ChannelMeans] = {}
    handles = []
    for site in sites:

        def note(module: Any, args: Any, output: Tensor, site: Site = site) -> None:
            means.setdefault(site.name, _ChannelMeans(site)).add(output)

        # Before the hook that rounds the output.
        handles.append(core(site.module).register_forward_hook(note, prepend=True))
    try:
        with torch.no_grad():
            for batch in batches:
                subject.simulation.run(subject.run, batch)
    finally:
        for handle in handles:
            handle.remove()
    return means


def correct_bias(
    float_model: nn.Module,
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    forward: Forward | None = None,
    progress: bool = True,
) -> Repair:
    """Shift biases so that each channel's mean is that of the float model.

    Rounding a weight shifts the mean of what the layer puts out, by the same amount for all inputs
    of a kind; a bias can take this back. The layers are corrected in the order in which they are
    called, each with those before it quantized and corrected: a forward of the data for each. This
    is the empirical bias correction of Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction" (2019), arXiv:1906.04721, which torch.ao has as
    `torch.ao.quantization._correct_bias` for models already converted.

    Args:
        float_model: the model before prepare.
        prepared: prepared and calibrated, not for QAT; a copy is corrected.
        data: batches, as for `analyze`.
        batches: use only this many.
        forward: as for `analyze`.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: an argument has a wrong type.
        AnalysisError: as for `analyze`; or no layer has a weight.
    """
    subject = Subject.of(float_model, prepared, data, batches, forward)
    if not is_prepared(prepared) or _is_for_training(prepared):
        raise AnalysisError(
            "correct_bias needs a model that was prepared for calibration: neither one for QAT, "
            "whose biases are trained, nor a converted one, whose biases are packed"
        )
    simulation = subject.simulation
    weighted = [
        site
        for site in simulation.sites.values()
        if site.way.weight is not None and hasattr(core(site.module), "bias")
    ]
    if not weighted:
        raise AnalysisError("correct_bias: no quantized layer of the model has a weight")
    before = quality(subject)
    simulation.set(FLOAT)
    exact = _means(subject, subject.data, weighted)
    repaired = copy.deepcopy(prepared)
    changed = []
    for name in tqdm(exact, "correcting biases", unit="layer", disable=not progress, leave=False):
        site = simulation.sites[name]
        simulation.set(QUANTIZED)
        shift = exact[name].mean() - _means(subject, subject.data, [site])[name].mean()
        layer = core(repaired.get_submodule(name))
        weight: Tensor = layer.weight
        bias = torch.zeros(len(shift), dtype=weight.dtype, device=weight.device)
        if layer.bias is not None:
            bias = layer.bias.detach()
        bias = (bias.double() + shift.to(bias.device)).to(bias.dtype)
        layer.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
        site.set_bias(bias)
        changed.append(name)
    return Repair(repaired, tuple(changed), before, quality(subject))


def reestimate_batch_norm(
    float_model: nn.Module,
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    forward: Forward | None = None,
) -> Repair:
    """Measure the mean and variance of batch norms anew, on quantized activations.

    For batch norms that were not folded: those of QAT's blocks, and those that stand alone. Others
    are part of a weight; for them, `correct_bias` corrects the mean. After Sun et al., "Hybrid
    8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks" (2019).

    Args:
        float_model: the model before prepare.
        prepared: prepared by `prepare` and calibrated, or by `prepare_qat`; a copy is changed.
        data: batches, as for `analyze`; of the size and variety that training has.
        batches: use only this many.
        forward: as for `analyze`.

    Raises:
        TypeError: an argument has a wrong type.
        AnalysisError: as for `analyze`; or the model has no batch norm of its own.
    """
    subject = Subject.of(float_model, prepared, data, batches, forward)
    repaired = copy.deepcopy(prepared)
    if not is_prepared(prepared):
        raise AnalysisError("reestimate_batch_norm needs a prepared model, not a converted one")
    norms: dict[str, Any] = {
        name: module
        for name, module in repaired.named_modules()
        if isinstance(module, _BATCH_NORMS) and module.track_running_stats
    }
    if not norms:
        raise AnalysisError(
            "reestimate_batch_norm: the model has no batch norm of its own; those that were fused "
            "for calibration are folded into weights, whose biases correct_bias corrects"
        )
    if _is_for_training(prepared):
        model = copy.deepcopy(prepared).apply(disable_observer)
    else:
        model = subject.simulation.model
        subject.simulation.set(QUANTIZED)
    places: Any = dict(model.named_modules())
    found = {name: places[name] for name in norms if name in places}
    _measure_anew(model, found, subject)
    for name, norm in found.items():
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            getattr(norms[name], buffer).copy_(getattr(norm, buffer))
    before, after = (
        quality(Subject.of(float_model, model, subject.data, None, forward))
        for model in (prepared, repaired)
    )
    return Repair(repaired, tuple(found), before, after)


def _is_for_training(model: nn.Module) -> bool:
    return any(isinstance(module, FakeQuantizeBase) for module in model.modules())


def _measure_anew(model: nn.Module, norms: dict[str, Any], subject: Subject) -> None:
    """Set the statistics of these batch norms, in place, to those of the data."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = {name: norm.momentum for name, norm in norms.items()}
    model.eval()
    try:
        for norm in norms.values():
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        with torch.no_grad():
            for batch in subject.data:
                subject.run(model, batch)
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
        for module, training in modes:
            module.training = training
