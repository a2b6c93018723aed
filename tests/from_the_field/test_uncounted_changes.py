"""Changes that leave no trace on a version counter, or that come while a call runs."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkernels
from seqkernels import settings
from seqkernels.backends import CpuBackend, native_module
from seqkernels.nn import Linear, ResilientBatchNorm1d, TransformerEncoder

native = pytest.mark.skipif(native_module.module is None, reason="there is no native module")
D = 32
X = torch.randn(6, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _backend_without_native() -> Iterator[None]:
    with settings.override(backend=None if native_module.module is not None else "reference"):
        yield


def run(module: Any, x: Tensor = X) -> Tensor:
    with torch.inference_mode():
        out: Tensor = module(x)
    return out


def norm_pair() -> tuple[nn.BatchNorm1d, ResilientBatchNorm1d]:
    """Torch's batch norm in eval mode, and one of ours that shares its tensors."""
    stock = nn.BatchNorm1d(D).eval()
    ours = ResilientBatchNorm1d.from_torch(stock).eval()
    for _ in range(2):
        torch.testing.assert_close(run(ours), run(stock))
    return stock, ours


def test_fused_steps_of_a_batch_norm_alone() -> None:
    stock, ours = norm_pair()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.5, fused=True)
    for _ in range(2):
        ours(X).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(run(ours), run(stock))


def test_statistics_that_torchs_kernel_updates() -> None:
    stock, ours = norm_pair()
    version = stock.running_mean._version  # type: ignore[union-attr]
    stock.train()
    stock(X * 5 + 3)
    stock.eval()
    assert stock.running_mean._version == version  # type: ignore[union-attr]
    torch.testing.assert_close(run(ours), run(stock))
    F.batch_norm(X * 3 - 1, ours.running_mean, ours.running_var, training=True)
    torch.testing.assert_close(run(ours), run(stock))


def test_statistics_of_a_chain_that_torchs_kernel_updates() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU()).eval()
    ours = copy.deepcopy(stock)
    seqkernels.swap(ours, precision_policy=seqkernels.PrecisionPolicy(keep=("*",)))
    for _ in range(3):
        torch.testing.assert_close(run(ours), run(stock))
        for model in (stock, ours):
            F.batch_norm(X * 3 - 1, model[1].running_mean, model[1].running_var, training=True)


def test_memory_that_is_used_again() -> None:
    stock, ours = norm_pair()
    for _ in range(100):
        run(ours)
        for _ in range(2):
            stock.running_mean.data = torch.randn(D)  # type: ignore[union-attr]
        ours.running_mean = stock.running_mean
        torch.testing.assert_close(run(ours), run(stock))


def test_data_of_an_inference_tensor() -> None:
    layer = Linear(D, 16, precision="fp32").eval()
    with torch.inference_mode():
        layer.weight.data = torch.randn(16, D)
        for _ in range(3):
            torch.testing.assert_close(layer(X), F.linear(X, layer.weight, layer.bias))
            layer.weight.mul_(2)


def test_a_weight_becomes_an_inference_tensor() -> None:
    layer = Linear(D, 16, precision="fp32").eval()
    run(layer)
    with torch.inference_mode():
        other = nn.Parameter(torch.randn(16, D))
    torch.utils.swap_tensors(layer.weight, other)
    for _ in range(2):
        torch.testing.assert_close(run(layer), F.linear(X, layer.weight, layer.bias).detach())


def encoder() -> TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 48, batch_first=True)
    return TransformerEncoder.from_torch(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ).eval()


@native
def test_what_changes_while_a_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is read, the kernel runs, and meanwhile another thread loads new weights."""
    module, x = encoder(), torch.randn(2, 5, D)
    new = {k: torch.randn_like(v) for k, v in module.state_dict().items()}
    kernel = CpuBackend.encoder

    def slow(self: CpuBackend, *arguments: Any) -> Tensor:
        result = kernel(self, *arguments)
        module.load_state_dict(new, assign=True)
        module.layers[1].norm1.eps = module.layers[1].norm2.eps = 0.5
        module.layers[0].norm1.eps = module.layers[0].norm2.eps = 0.5
        return result

    with monkeypatch.context() as patch:
        patch.setattr(CpuBackend, "encoder", slow)
        run(module, x)
    expected = encoder()
    expected.load_state_dict(new)
    for layer in expected.layers:
        layer.norm1.eps = layer.norm2.eps = 0.5
    for _ in range(3):
        assert torch.equal(run(module, x), run(expected, x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_result_is_contiguous_as_torchs(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 48, batch_first=batch_first)
    stock = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    ours = TransformerEncoder.from_torch(stock).eval()
    wide = torch.randn(6, 3, 2 * D)
    for x in (wide[..., :D].transpose(0, 1), wide[..., ::2], wide[..., :D].permute(1, 0, 2)):
        for _ in range(2):
            for module in (stock, ours, ours.layers[0]):
                assert run(module, x).is_contiguous()
                run(module, x).view(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nested", "jagged", "coo", "csr"])
def test_inputs_of_other_layouts(kind: str) -> None:
    stock = nn.Linear(D, D).eval()
    ours = Linear.from_torch(stock).eval()
    chain = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).eval()
    run(ours)
    parts = [torch.randn(4, D), torch.randn(2, D)]
    made = {
        "nested": lambda: torch.nested.nested_tensor(parts),
        "jagged": lambda: torch.nested.nested_tensor(parts, layout=torch.jagged),
        "coo": lambda: torch.eye(D).to_sparse(),
        "csr": lambda: torch.eye(D).to_sparse_csr(),
    }
    x = made[kind]()
    expected, got = run(stock, x), run(ours, x)
    pairs = zip(expected.unbind(), got.unbind(), strict=True) if expected.is_nested else None
    for a, b in pairs or [(expected, got)]:
        torch.testing.assert_close(b, a)
    if kind == "coo":
        swapped = copy.deepcopy(chain)
        seqkernels.swap(swapped)
        torch.testing.assert_close(run(swapped, x), run(chain, x))


def test_a_shape_that_torch_refuses() -> None:
    layer = Linear(D, 16).eval()
    run(layer)
    layer.weight.data = layer.weight.data.view(D, 16)
    with pytest.raises((ValueError, RuntimeError)):
        run(layer)


def test_a_clone_that_shares_the_attributes() -> None:
    layer = Linear(D, 16, precision="fp32").eval()
    run(layer)
    clone = Linear.__new__(Linear)
    clone.__dict__ = layer.__dict__.copy()
    clone._parameters = {n: nn.Parameter(torch.randn_like(p)) for n, p in layer.named_parameters()}
    for _ in range(2):
        for module in (clone, layer):
            expected = F.linear(X, module.weight, module.bias).detach()
            torch.testing.assert_close(run(module), expected)


def test_other_attributes_as_a_whole() -> None:
    module, x = encoder(), torch.randn(2, 5, D)
    before = run(module, x)
    for layer in module.layers:
        for norm in (layer.norm1, layer.norm2):
            norm.__dict__ = norm.__dict__ | {"eps": 3.0}
    assert not torch.allclose(run(module, x), before, atol=1e-2)


@pytest.mark.parametrize("kind", ["linear", "norm", "activation"])
def test_methods_replaced_on_torchs_classes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes: dict[str, tuple[Any, Any]] = {
        "linear": (nn.Linear, Linear(D, D).eval()),
        "norm": (nn.BatchNorm1d, ResilientBatchNorm1d(D).eval()),
    }
    if kind == "activation":
        chain = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU()).eval()
        seqkernels.swap(chain)
        classes[kind] = (nn.ReLU, chain)
    cls, module = classes[kind]
    run(module)
    monkeypatch.setattr(cls, "forward", lambda self, x: x * 0 + 7)
    assert (run(module) == 7).all()


@pytest.mark.parametrize("make", [lambda: Linear(D, D), lambda: ResilientBatchNorm1d(D), encoder])
def test_a_module_is_freed_with_its_last_reference(make: Any) -> None:
    module = make().eval()
    x = torch.randn(2, 5, D) if isinstance(module, TransformerEncoder) else X
    for _ in range(2):
        run(module, x)
    died = weakref.ref(module)
    gc.collect()
    gc.disable()
    try:
        del module
        assert died() is None
    finally:
        gc.enable()
