"""A swapped model goes through AOTInductor into a package and is loaded again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import settings
from seqkernels.backends import native_module

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*nested tensors is in prototype.*",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)
BF16 = seqkernels.PrecisionPolicy(bf16=("chain.*",))


@pytest.fixture(autouse=True)
def _backend_without_native() -> Any:
    with settings.override(backend=None if native_module.module is not None else "reference"):
        torch._dynamo.reset()
        yield


class Model(nn.Module):
    """An exact norm alone, a chain with norms on both sides, and an encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.alone = nn.BatchNorm1d(6)
        self.chain = nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU()
        )
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.chain(self.alone(x)).unflatten(0, (-1, 2))  # [N, 2, 8]
        encoded: Tensor = self.encoder(tokens)
        return encoded


def swapped(**options: Any) -> Model:
    model = Model().eval()
    report = seqkernels.swap(model, precision_policy=BF16, **options)
    assert [r.name for r in report.replaced] == [
        "encoder",
        "alone",
        "chain.0",
        "chain.1",
        "chain.2",
        "chain",
    ]
    return model


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def numbers(value: Any) -> list[float]:
    """The floats among an op's arguments, in lists too."""
    if isinstance(value, list | tuple):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("options", [{}, {"resilient": True}], ids=["exact", "bounded"])
def test_no_op_of_an_exported_model_has_an_infinite_argument(options: dict[str, Any]) -> None:
    with torch.no_grad():
        program = torch.export.export(swapped(**options), (X,))
    ours = [n for n in program.graph.nodes if "seqkernels" in str(n.target)]
    assert len(ours) == 3
    assert all(math.isfinite(number) for node in ours for number in numbers(node.args))


def test_a_package_of_an_exact_norm_a_chain_and_an_encoder_is_loaded(tmp_path: Path) -> None:
    model = swapped()
    with torch.no_grad():
        expected = model(X)
        program = torch.export.export(model, (X,))
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # to be done sooner
        )
        loaded = torch._inductor.aoti_load_package(path)
        assert torch.equal(loaded(X), expected)
