"""Exported programs observe, and can be saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from oracle import assert_same, assert_unchanged, snapshot
from zoo import prepared

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["min_max", "histogram", "qat"])
def test_an_exported_program_observes_like_the_model(kind: str, strict: bool) -> None:
    model = prepared(kind)
    expected = copy.deepcopy(model)
    before = snapshot(model)
    x = torch.randn(4, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: batch},))
    assert_unchanged(model, before)
    exported = program.module()
    for y in (x * 3, torch.randn(7, 3, 8, 8) * 5):
        assert_same(exported(y), expected(y))
    found = dict(exported.named_buffers())
    for name, buffer in expected.named_buffers():
        if name in found:  # those that no op reads are left out
            assert_same(found[name], buffer, name)
    assert any("min_val" in name for name in found)


def test_an_exported_program_can_be_saved(tmp_path: Path) -> None:
    model = prepared("qat")
    x = torch.randn(4, 3, 8, 8)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert_same(loaded(x * 3), model(x * 3))
