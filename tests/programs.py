"""Programs that quantize a model, as data, and the machine that runs them.

A `Program` names a model's pieces, its configs and the steps that it goes through. A `World` runs
it under one library; what `World.do` returns of a step is all that a user can see of it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.quantized as nnq
import torch.ao.quantization
import torch.fx
import torch.optim.swa_utils
from torch import Tensor, nn

import fastquant
from strategies import RANGES, random_values
from users_code import (
    CUSTOM,
    FUSABLE,
    LOG,
    PIECES,
    Block,
    Config,
    Hook,
    Piece,
    Residual,
    class_name,
    do_to_block,
    do_to_observer,
    do_to_piece,
    factory,
    note,
)

# ------------------------------------------------------------------------------------------- models


class Tokens(nn.Module):
    """An embedding and an embedding bag, and pieces that work on what they give."""

    def __init__(self, pieces: list[nn.Module]) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.bag = nn.EmbeddingBag(12, 6, mode="sum", include_last_offset=True)
        self.body = nn.Sequential(*pieces)

    def forward(self, indices: Tensor) -> Tensor:
        bags = self.bag(indices.flatten(), torch.arange(0, indices.numel() + 1, 2))
        return self.body(torch.cat([self.table(indices[0]), bags]))


class Model(nn.Module):
    """Pieces between stubs, held by a container, with floating pieces before."""

    def __init__(self, program: Program, ns: Any, make: Callable[[Piece], nn.Module]) -> None:
        super().__init__()
        self.before = nn.Sequential(*map(make, program.before))
        pieces = [make(piece) for piece in program.pieces]
        self.order = [str(i) for i in range(len(pieces))]
        self.body: nn.Module
        if program.container == "dict":
            self.order = [f"piece{i}" for i in self.order]
            self.body = nn.ModuleDict(dict(zip(self.order, pieces, strict=True)))
        else:
            container = nn.ModuleList if program.container == "list" else nn.Sequential
            self.body = container(*(pieces if container is nn.Sequential else [pieces]))
        if program.shared == "attribute":
            self.again = pieces[0]
        elif program.shared == "name":
            self.body.add_module("again", pieces[0])
            self.order.append("again")
        self.quant: nn.Module = ns.QuantStub()
        self.dequant: nn.Module = ns.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(self.before(x))
        if isinstance(self.body, nn.Sequential):
            x = self.body(x)
        else:
            for name in self.order:
                x = self.body.get_submodule(name)(x)
        if hasattr(self, "again"):
            x = self.again(x)
        return self.dequant(x)


# ----------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Step:
    """Something that a program does with its model, after it is prepared or converted.

    `target` and `seed` choose which module and which numbers.
    """

    do: str
    what: str = ""
    target: int = 0
    seed: int = 0


DEFAULT = Config()


@dataclass(frozen=True)
class Program:
    """A user's program: a model, its configs, and what is done with it."""

    mode: str = "static"
    family: str = "rows"
    pieces: tuple[Piece, ...] = (Piece(),)
    before: tuple[Piece, ...] = ()
    container: str = "sequential"
    wrapper: bool = False
    shared: str | None = None
    fuse: bool = True
    config: Config = DEFAULT
    other_config: Config = DEFAULT
    inplace: bool = False
    prepare: str = "plain"
    patched_class: tuple[str, str] | None = None
    global_hooks: bool = False
    steps: tuple[Step, ...] = (Step("run"),)
    convert: str = "convert"
    then: tuple[Step, ...] = (Step("run"),)
    patched: bool = False

    def trace(self) -> list[Step]:
        """Every step, in order."""
        if self.mode == "dynamic":
            return [Step("build"), Step("run"), Step("quantize_dynamic", self.convert), *self.then]
        return [
            Step("build"),
            *([Step("fuse")] if self.fuse else []),
            *(
                [Step("quantize")]
                if self.prepare == "one_call"
                else [Step("prepare"), *self.steps, Step("qparams"), Step("convert", self.convert)]
            ),
            *self.then,
        ]


@dataclass
class Seen:
    """All that a user can see of a step."""

    raised: Exception | None = None
    output: Any = None
    log: list[str] = dataclasses.field(default_factory=list)
    modules: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)


def plain(value: Any) -> Any:
    """A value in parts that compare: quantized tensors with their parameters."""
    if isinstance(value, Tensor) and value.is_quantized:
        if value.qscheme() in (
            torch.per_channel_affine,
            torch.per_channel_affine_float_qparams,
        ):
            return (
                str(value.dtype),
                value.int_repr(),
                value.q_per_channel_scales(),
                value.q_per_channel_zero_points(),
            )
        return (str(value.dtype), value.int_repr(), value.q_scale(), value.q_zero_point())
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return tuple(plain(item) for item in value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    # Packed weights show nothing; outputs must tell.
    return "packed" if isinstance(value, torch.ScriptObject) else value


def _names_of(hooks: dict[int, Any]) -> list[str]:
    """The names of hooks; of the two that we give fused modules, what torch.ao has instead."""
    in_place_of = {"observe_output_once": "_observer_forward_hook", "count_output_twice": ""}
    names = [
        hook.label if isinstance(hook, Hook) else getattr(hook, "__name__", str(type(hook)))
        for hook in hooks.values()
    ]
    return [name for name in (in_place_of.get(name, name) for name in names) if name]


class _NothingToTakeError(AttributeError, TypeError, RuntimeError, pickle.PicklingError):
    """The other world could not pickle its observers, for whatever reason."""


SETTINGS = (
    "dtype",
    "qscheme",
    "quant_min",
    "quant_max",
    "ch_axis",
    "is_dynamic",
    "reduce_range",
    "has_customized_qrange",
    "averaging_constant",
    "bins",
    "is_per_channel",
)
PATCHABLE = (
    ("MinMaxObserver", "forward"),
    ("MinMaxObserver", "calculate_qparams"),
    ("UniformQuantizationObserverBase", "_calculate_qparams"),
    ("PerChannelMinMaxObserver", "forward"),
    ("HistogramObserver", "forward"),
    ("HistogramObserver", "_non_linear_param_search"),
    ("FakeQuantize", "forward"),
    ("FakeQuantize", "calculate_qparams"),
)


NONFINITE = {"nan": math.nan, "infinite": math.inf, "minus infinite": -math.inf}
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}


class World:
    """A program's run under one library."""

    def __init__(self, name: str, program: Program) -> None:
        self.name = name
        self.program = program
        self.ns: Any = fastquant if name == "fast" else torch.ao.quantization
        self.model: Any = None
        # The model before the running step, for the other world.
        self.before: Any = None
        self.converted = False
        self.pickled: bytes | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Around each step: the library patched, classes patched, global hooks on, as asked."""
        LOG.clear()
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if self.name == "patched":
                stack.enter_context(fastquant.patch_torch_ao())
            if self.program.patched_class is not None:
                stack.enter_context(self._class_patched(*self.program.patched_class))
            if self.program.global_hooks:
                for register, label in (
                    (nn.modules.module.register_module_forward_pre_hook, "global pre-hook"),
                    (nn.modules.module.register_module_forward_hook, "global hook"),
                ):
                    stack.callback(register(Hook(label)).remove)
            yield

    @contextlib.contextmanager
    def _class_patched(self, name: str, method: str) -> Iterator[None]:
        cls = getattr(self.ns.observer, name, None) or getattr(self.ns.fake_quantize, name)
        own, original = method in vars(cls), getattr(cls, method)

        def patched(self: Any, *args: Any) -> Any:
            note(f"patched {method}")
            return original(self, *args)

        setattr(cls, method, patched)
        try:
            yield
        finally:
            if own:
                setattr(cls, method, original)
            else:
                delattr(cls, method)

    def do(self, step: Step, other: World) -> Seen:
        """Run a step; `other` is the same program under the other library, before the step."""
        seen, before = Seen(), self.model
        with self.active():
            torch.manual_seed(step.seed)
            try:
                seen.output = plain(getattr(self, f"_{step.do}")(step, other))
            except Exception as error:
                seen.raised = error
            seen.log = list(LOG)
            try:
                if seen.raised is None:
                    self._look(seen)
            except Exception as error:
                seen.raised = error
        if seen.raised is not None:
            self.model = before
        return seen

    def _look(self, seen: Seen) -> None:
        for path, module in self.model.named_modules(remove_duplicate=False):
            qconfig = getattr(module, "qconfig", "none given")
            seen.modules[path] = {
                "class": class_name(module),
                "training": module.training,
                "hooks": _names_of(module._forward_hooks),
                "pre_hooks": _names_of(module._forward_pre_hooks),
                "qconfig": qconfig if qconfig in (None, "none given") else "a qconfig",
                "own_forward": "forward" in vars(module),
                "settings": {
                    name: str(getattr(module, name))
                    for name in SETTINGS
                    if hasattr(module, "calculate_qparams") and hasattr(module, name)
                },
            }
        seen.tensors = {
            **{name: ("parameter", p.requires_grad) for name, p in self.model.named_parameters()},
            **{name: "buffer" for name, _ in self.model.named_buffers()},
        }
        seen.state = plain(dict(self.model.state_dict()))

    # --- making things of the program's descriptions

    def config(self, config: Config) -> Any:
        if config.name is None:
            return self.ns.QConfig(
                activation=factory(self.name, self.ns, config.activation),
                weight=factory(self.name, self.ns, config.weight),
            )
        if config.name.startswith("default"):
            return getattr(self.ns, config.name)
        kind, backend, *version = config.name.split()
        if kind == "qat":
            return self.ns.get_default_qat_qconfig(backend, *map(int, version))
        return self.ns.get_default_qconfig(backend)

    def build(self) -> nn.Module:
        program = self.program
        torch.manual_seed(0)
        other_config = self.config(program.other_config)
        training = program.mode == "qat"

        def make(piece: Piece) -> nn.Module:
            module = PIECES[program.family][piece.kind](self.ns).train(training)
            for deed in piece.done:
                do_to_piece(module, deed, other_config)
            return module

        model: nn.Module
        if program.family == "tokens":
            model = Tokens([make(piece) for piece in program.pieces]).train(training)
        elif program.wrapper:
            model = self.ns.QuantWrapper(nn.Sequential(*map(make, program.pieces)))
            model = model.train(training)
        else:
            model = Model(program, self.ns, make)
            model.training = training
            model.before.training = model.body.training = training
            for stub in (model.quant, model.dequant):
                stub.training = training
        if program.mode != "dynamic":
            model.qconfig = self.config(program.config)
        return model

    def fusable(self) -> list[list[str]]:
        body = "module" if self.program.wrapper else "body"
        prefix = "piece" if self.program.container == "dict" and not self.program.wrapper else ""
        return [
            [f"{body}.{prefix}{i}.{part}" for part in FUSABLE[piece.kind]]
            for i, piece in enumerate(self.program.pieces)
            if piece.kind in FUSABLE
        ]

    def fuse(self, model: nn.Module) -> Any:
        names = self.fusable()
        if not names:
            return model
        if self.program.mode == "qat":
            return self.ns.fuse_modules_qat(model, names, inplace=self.program.inplace)
        return self.ns.fuse_modules(model, names, inplace=self.program.inplace)

    def prepare(self, model: nn.Module) -> Any:
        how, inplace = self.program.prepare, self.program.inplace
        if how == "propagated":
            config, other = model.qconfig, self.config(self.program.other_config)
            self.ns.propagate_qconfig_(
                model, {"": config, nn.ReLU: other, "body.0": None, "body.1": other}
            )
        elif how == "wrapped_leaves":
            self.ns.propagate_qconfig_(model)
            model = self.ns.add_quant_dequant(model)
        if self.program.mode == "qat":
            return self.ns.prepare_qat(model, inplace=inplace)
        options: dict[str, Any] = {
            "allow_list": {"allow_list": {nn.Linear, nn.Conv2d}},
            "whole": {"observer_non_leaf_module_list": [Residual, Block]},
            "no_custom": {"prepare_custom_config_dict": {}},
            "custom": {"prepare_custom_config_dict": CUSTOM},
        }
        return self.ns.prepare(model, inplace=inplace, **options.get(how, {}))

    def convert(self, model: nn.Module, how: str) -> Any:
        if self.program.mode == "qat":
            model.eval()
        options: dict[str, Any] = {
            "convert": {},
            "inplace": {"inplace": True},
            "keep_qconfig": {"remove_qconfig": False},
            "precomputed": {"use_precomputed_fake_quant": True},
            "reference": {"is_reference": True},
            "mapping": {"mapping": {nn.Linear: nnq.Linear, nn.Conv2d: nnq.Conv2d}},
        }[how]
        if self.program.prepare == "custom":
            options["convert_custom_config_dict"] = CUSTOM
        return self.ns.convert(model, **options)

    def quantize_dynamic(self, model: nn.Module, how: str) -> Any:
        dtypes = {
            "float16": torch.float16,
            "quint8": torch.quint8,
            "quint4x2": torch.quint4x2,
            "qint32": torch.qint32,
        }
        config = self.config(self.program.config)
        specs: dict[str, Any] = {
            "linear": {nn.Linear},
            "names": {"body.0", "table"},
            "dict": {nn.Linear: config, "body.1": self.ns.float16_dynamic_qconfig},
            "nothing": {"body.0": None},
        }
        return self.ns.quantize_dynamic(
            model,
            specs.get(how),
            dtype=dtypes.get(how, torch.qint8),
            inplace=how == "inplace",
        )

    def input(self, step: Step) -> Tensor:
        kind = step.what if step.what in RANGES else "normal"
        if self.program.family == "tokens":
            generator = torch.Generator().manual_seed(step.seed)
            return torch.randint(0, 12, (2, 4), generator=generator)
        rows = 0 if step.what == "empty" else 1 if step.what == "one" else 5
        shape = (rows, 4, 5, 6) if self.program.family == "image" else (rows, 6)
        x = random_values(shape, torch.float32, step.seed, kind)
        if step.what in NONFINITE and x.numel():
            x.flatten()[:: x.numel() // 3] = NONFINITE[step.what]
        if step.what in DTYPES:
            return x.to(DTYPES[step.what])
        if step.what == "channels_last" and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def observers(self, fused_too: bool = True) -> list[Any]:
        """Observers and fake-quantizers of the model, in order."""
        fused: set[nn.Module] = set()
        found: list[Any] = []
        for module in self.model.modules():
            if not hasattr(module, "calculate_qparams"):
                continue
            if isinstance(module, torch.ao.quantization.FusedMovingAvgObsFakeQuantize):
                fused.update(module.modules())
            if fused_too or module not in fused:
                found.append(module)
        return found

    # --- steps

    def _build(self, step: Step, other: World) -> None:
        self.model = self.build()

    def _fuse(self, step: Step, other: World) -> None:
        self.model = self.fuse(self.model)

    def _prepare(self, step: Step, other: World) -> None:
        self.model = self.prepare(self.model)

    def _convert(self, step: Step, other: World) -> None:
        self.model = self.convert(self.model, step.what)
        self.converted = True

    def _quantize(self, step: Step, other: World) -> None:
        """Prepare, run the program's steps that run, convert: in one call."""

        def run(model: nn.Module, *args: Any) -> None:
            note(f"run {args}")
            self.model = model
            for step in self.program.steps:
                if step.do == "run":
                    self._run(step, other)

        quantize = self.ns.quantize_qat if self.program.mode == "qat" else self.ns.quantize
        self.model = quantize(self.model, run, [1, 2], inplace=self.program.inplace)
        self.converted = True

    def _quantize_dynamic(self, step: Step, other: World) -> None:
        self.model = self.quantize_dynamic(self.model, step.what)
        self.converted = True

    def _run(self, step: Step, other: World) -> Any:
        x = self.input(step)
        if self.program.mode != "qat" or self.converted or not self.model.training:
            with torch.no_grad():
                return self.model(x)
        self.model.zero_grad()
        y = self.model(x)
        loss = y.square().mean()
        loss.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.01)
        return y, gradients

    def _qparams(self, step: Step, other: World) -> Any:
        return {
            str(i): tuple(part.float() for part in observer.calculate_qparams())
            for i, observer in enumerate(self.observers())
            if class_name(observer) not in ("NoopObserver", "PlaceholderObserver")
        }

    def _toggle(self, step: Step, other: World) -> None:
        functions = {
            "train": nn.Module.train,
            "eval": nn.Module.eval,
            "freeze_bn": lambda model: model.apply(nniqat.freeze_bn_stats),
            "update_bn": lambda model: model.apply(nniqat.update_bn_stats),
        }
        if step.what in functions:
            functions[step.what](self.model)
        else:
            self.model.apply(getattr(self.ns, step.what))

    def _learn(self, step: Step, other: World) -> None:
        """A switch that learnable fake-quantizers have."""
        for observer in self.observers():
            if hasattr(observer, step.what):
                getattr(observer, step.what)()

    def _narrow(self, step: Step, other: World) -> None:
        self.model.to(DTYPES[step.what])

    def _change(self, step: Step, other: World) -> None:
        """Do to a module of the prepared model what users do to the pieces of a float one."""
        modules = [
            module
            for module in self.model.modules()
            if hasattr(module, "activation_post_process")
            and not hasattr(module, "calculate_qparams")
        ]
        if modules:
            module = modules[step.target % len(modules)]
            do_to_piece(module, step.what, self.config(self.program.other_config))

    def _change_block(self, step: Step, other: World) -> None:
        blocks = [module for module in self.model.modules() if hasattr(module, "bn")]
        if blocks:
            do_to_block(blocks[step.target % len(blocks)], step.what)

    def _copy(self, step: Step, other: World) -> None:
        self.model = copy.deepcopy(self.model)

    def _pickle(self, step: Step, other: World) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))

    def _adopt(self, step: Step, other: World) -> None:
        """Take observers that the oracle's world pickled, with all they have seen."""
        if self.program.patched_class is not None:
            return  # its classes are others
        if self.name == "ao":
            self.pickled = None
            observers = {
                path: module
                for path, module in self.model.named_modules()
                if path.endswith("activation_post_process")
                and "activation_post_process" not in path.split(".")[:-2]
            }
            self.pickled = pickle.dumps(observers)
        data = self.pickled if self.name == "ao" else other.pickled
        if data is None:
            raise _NothingToTakeError
        for path, observer in pickle.loads(data).items():
            owner, name = path.rsplit(".", 1) if "." in path else ("", path)
            setattr(self.model.get_submodule(owner), name, observer)

    def _fresh(self, device: str = "cpu") -> Any:
        built = self.build().to(device)
        if self.program.mode == "dynamic":
            return self.quantize_dynamic(built, self.program.convert)
        fresh = self.prepare(self.fuse(built) if self.program.fuse else built)
        return self.convert(fresh, self.program.convert) if self.converted else fresh

    def _reload(self, step: Step, other: World) -> Any:
        """Load the state, of this world or the other, into a model made anew or this one."""
        state = (other.before if "other" in step.what else self.model).state_dict()
        if "assign" in step.what:
            state = copy.deepcopy(state)  # the model takes the tensors themselves
        if "partly" in step.what:
            for key in list(state)[step.target :: 2]:
                del state[key]
        device = "meta" if "meta" in step.what else "cpu"
        model = self.model if "same" in step.what else self._fresh(device)
        if "emptied" in step.what:
            model.to_empty(device="cpu")
        result = model.load_state_dict(
            state, strict="lax" not in step.what, assign="assign" in step.what
        )
        self.model = model.train(self.model.training)
        return [sorted(set(keys)) for keys in result]

    def _repr(self, step: Step, other: World) -> str:
        text = repr(self.model)
        return text.replace("_patched", "").replace("_fast", "").replace("_ao", "")

    def _trace(self, step: Step, other: World) -> Any:
        if any("Histogram" in class_name(observer) for observer in self.observers()):
            return None  # torch.ao's search is a Python loop, of which tracing keeps every round
        # A copy, for tracing runs it.
        model = copy.deepcopy(self.model)
        # Numbers are another matter: torch.ao's observers branch, and a trace keeps one branch.
        return torch.jit.trace(model, self.input(step), check_trace=False)(self.input(step)).shape

    def _symbolic_trace(self, step: Step, other: World) -> Any:
        return torch.fx.symbolic_trace(copy.deepcopy(self.model))(self.input(step))

    def _average(self, step: Step, other: World) -> Any:
        """An exponential moving average's copy, updated twice."""
        averaged = torch.optim.swa_utils.AveragedModel(self.model, use_buffers=bool(step.target))
        self._run(step, other)
        averaged.update_parameters(self.model)
        self._run(step, other)
        averaged.update_parameters(self.model)
        return dict(averaged.state_dict())

    def _observer_state(self, step: Step, other: World) -> Any:
        """Observers' states by torch.ao's own pair of functions, into a model made anew."""
        source = other.before if "other" in step.what else self.model
        state = self.ns.get_observer_state_dict(source)
        saved = dict(sorted(state.items()))
        fresh = self._fresh()
        self.ns.load_observer_state_dict(fresh, state)
        self.model = fresh.train(self.model.training)
        return saved

    def _double(self, step: Step, other: World) -> None:
        self.model.double().float()

    def _tweak(self, step: Step, other: World) -> None:
        observers = self.observers(fused_too=False)
        if observers:
            do_to_observer(self.ns, observers[step.target % len(observers)], step.what)
