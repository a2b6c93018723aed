"""Tools that read a model: they get the definition, or one sentence that says what to do."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import seqkernels
from seqkernels import backends
from seqkernels.nn import UserSequenceEncoder
from tests.from_the_field.stock_models import B, D, L, draw, encoder, swapped

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*nested tensors is in prototype.*",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)
RIGHT = torch.arange(L) >= torch.tensor([40, 17, 12, 31]).unsqueeze(1)


class Model(nn.Module):
    """An encoder and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = encoder()
        self.head = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Any, mask: Any) -> Any:
        h = self.encoder(x, src_key_padding_mask=mask)
        return self.head(h[:, 0])


def test_symbolic_trace() -> None:
    """Its modules are leaves, as torch's are, and run on the kernels."""
    model = Model().eval()
    ours = swapped(model)
    traced = torch.fx.symbolic_trace(ours)
    leaves = {str(n.target) for n in traced.graph.nodes if n.op == "call_module"}
    stock = torch.fx.symbolic_trace(model)
    assert leaves == {str(n.target) for n in stock.graph.nodes if n.op == "call_module"}
    backends.calls.clear()
    with torch.inference_mode():
        # Its chains run one by one.
        torch.testing.assert_close(traced(draw(B, L, D), RIGHT), ours(draw(B, L, D), RIGHT))
    assert backends.calls


def test_symbolic_trace_of_this_package_s_own_encoder() -> None:
    module = nn.Sequential(UserSequenceEncoder(16, 0, 2, 8, 1, fusion="none")).eval()
    traced, x = torch.fx.symbolic_trace(module), draw(B, 5, 16)
    with torch.inference_mode():
        assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda: swapped(nn.Sequential(encoder(), nn.Linear(D, 8)).eval()),
        lambda: swapped(encoder().layers[0]),
        lambda: swapped(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()),
        lambda: swapped(nn.Sequential(nn.BatchNorm1d(8)).eval(), resilient=True),
        lambda: UserSequenceEncoder(16, 8, 2, 8, 1),
    ],
)
def test_script_is_one_sentence(build: Any) -> None:
    """Never a model without its bounds; restored, it compiles."""
    model = build()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=r"call restore\(\) on the report of swap first"):
        torch.jit.script(model)
    assert [type(m) for m in model.modules()] == kinds
    stock = nn.Sequential(encoder(), nn.Linear(D, 8)).eval()
    ours = copy.deepcopy(stock)
    seqkernels.swap(ours).restore()
    scripted, x = torch.jit.script(ours), draw(B, L, D)
    with torch.inference_mode():
        assert torch.equal(scripted(x), stock(x))


def test_onnx_gets_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that torch.onnx.export(dynamo=True) translates, by a package of its own."""
    stock = nn.Sequential(encoder(), nn.Linear(D, 8), nn.BatchNorm1d(8)).eval()
    ours, x = swapped(stock), draw(B, L, D)
    with monkeypatch.context() as exporting:
        exporting.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        program = torch.export.export(ours[0], (x,), strict=False)
    assert "seqkernels" not in str(program.graph)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), stock[0](x))
    program = torch.export.export(copy.deepcopy(ours[0]), (x,), strict=False)
    assert "seqkernels.encoder" in str(program.graph)


def test_compiled_optimizers_are_noticed() -> None:
    """A step that is one graph counts as a change too."""
    torch._dynamo.reset()
    ours, x = swapped(encoder(1)), draw(B, L, D)
    with torch.inference_mode():
        before = ours(x)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(optimizer.step, backend="aot_eager")()
    with torch.inference_mode():
        after = ours(x)
        assert torch.equal(after, copy.deepcopy(ours)(x))
    assert not torch.equal(before, after)
    torch._dynamo.reset()
