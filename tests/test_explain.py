"""explain says what a call then does; warmup leaves nothing for the first request to do."""

import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import backends, settings
from seqkernels.backends import cpu, gpu, native_module, triton
from seqkernels.backends.cuda import CudaBackend

D, HEADS, FF = 16, 2, 8
native = pytest.mark.skipif(native_module.module is None, reason="there is no native module")
X = torch.randn(2, 5, D)


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    backends.calls.clear()


def layer(**options: Any) -> seqkernels.nn.TransformerEncoderLayer:
    return seqkernels.nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True, **options).eval()


def only(explanation: seqkernels.Explanation) -> seqkernels.Explained:
    (entry,) = explanation.entries
    return entry


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cap", [None, *(s.name for s in cpu.isa_table())])
def test_it_says_what_runs(cap: str | None, dtype: torch.dtype) -> None:
    module, x = layer().to(dtype), X.to(dtype)
    with settings.override(isa=cap):
        entry = only(seqkernels.explain(module, x))
        assert entry == only(seqkernels.explain(module))  # the dtype of the parameters
        backends.calls.clear()
        with torch.inference_mode():
            module(x)
    others = dict(entry.why_not)
    assert dict(backends.calls) == ({} if dtype == torch.float64 else {entry.runs: 1})
    if dtype == torch.float64:
        assert entry.runs == "plain PyTorch"
        assert set(others) == {"cuda", "triton", "cpu"}
        assert others["cpu"] == ("dtype torch.float64, it takes float32 and bfloat16",)
    else:
        with settings.override(isa=cap):
            table = {f"cpu/{s.name}": s.reasons for s in cpu.isa_table()}
        assert {*table, "cuda", "triton", "reference"} == {entry.runs, *others}
        assert all(others[name] == reasons for name, reasons in table.items() if reasons)
        assert others["reference"] == ("a faster backend runs",)


def test_what_keeps_the_kernel_from_running() -> None:
    module = layer()
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    masked = only(seqkernels.explain(module, X, causal))
    assert masked.runs == "plain PyTorch"
    assert ("fused kernel", ("an attention mask was given",)) in masked.why_not
    assert only(seqkernels.explain(module, X, src_mask=causal)) == masked

    module.train()
    training = only(seqkernels.explain(module, X))
    assert training.runs == "plain PyTorch"
    assert "the module is in training mode; call .eval()" in dict(training.why_not)["fused kernel"]
    assert module.training
    assert module.linear1.training

    odd = only(seqkernels.explain(layer(activation=torch.tanh), X))
    assert "'tanh' is none the kernel knows" in dict(odd.why_not)["fused kernel"][0]


def test_a_named_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = only(seqkernels.explain(layer(backend="reference"), X))
    assert asked.runs == "reference"
    assert [name for name, _ in asked.why_not] == ["cuda", "triton", "cpu"]
    assert all(reasons[0] == "backend 'reference' was asked for" for _, reasons in asked.why_not)
    monkeypatch.setattr(native_module, "module", None)
    monkeypatch.setattr(native_module, "import_error", "it was not built")
    failing = only(seqkernels.explain(layer(backend="cpu")))
    assert failing.runs == "an error: backend 'cpu' cannot run"
    assert failing.why_not == (("cpu", ("it was not built",)),)
    fallback = only(seqkernels.explain(layer()))
    assert fallback.runs == "plain PyTorch"
    assert dict(fallback.why_not)["cpu"] == ("it was not built",)


class _Kernels:
    """Stands in for the native CUDA kernels."""

    def encoder_unsupported_reasons(self, *size: int) -> list[str]:
        return [f"no kernel for {size}"]


@pytest.mark.parametrize(
    ("version", "reasons"),
    [
        ("3.5.1", ("Triton 3.5.1, it needs 3.6 or newer",)),
        ("3.6.0", ()),
        ("3.6.0+git1234", ()),
        ("3.10.0", ()),
        (None, ("Triton is not installed; `pip install triton` adds it",)),
    ],
)
def test_a_triton_that_is_too_old_is_a_reason(
    version: str | None, reasons: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is checked when it matters, since a requirement would move torch."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    triton.backend.unmet_by_triton.cache_clear()
    try:
        layer = seqkernels.nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1
        )
        why_not = dict(only(seqkernels.explain(layer.eval())).why_not)["triton"]
        assert [r for r in why_not if "Triton" in r] == list(reasons)
    finally:
        triton.backend.unmet_by_triton.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_unmet_condition_of_every_backend(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that only a GPU kernel minds are told on the CPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(CudaBackend, "kernels", lambda self: _Kernels())
    missing = ("Triton is not installed; `pip install triton` adds it",)
    monkeypatch.setattr(triton.backend, "unmet_by_triton", lambda: missing)
    wide = nn.TransformerEncoderLayer(600, 2, FF, batch_first=True)
    modules = [
        (seqkernels.nn.TransformerEncoder(wide, 3), (600, 2, FF, 3)),
        (seqkernels.nn.UserSequenceEncoder(592, 8, 2, FF, 1), (600, 2, FF, 1)),
    ]
    no_gpu = gpu.unmet(takes_amd=True)
    common = {"tensors on cpu, it takes CUDA tensors", *no_gpu}
    if dtype == torch.float64:
        common.add("dtype torch.float64, it takes float32 and bfloat16")
    for module, size in modules:
        why_not = dict(only(seqkernels.explain(module.to(dtype).eval())).why_not)
        assert {*why_not["cuda"]} == {*common, f"no kernel for {size}"}
        assert {*why_not["triton"]} == {
            *common, *missing,
            "d_model 600, it takes at most 512", "head_dim 300, it takes at most 256",
        }  # fmt: skip
    assert len(no_gpu) == 1
    linear = dict(only(seqkernels.explain(seqkernels.nn.Linear(4, 4).eval())).why_not)
    assert "there is no CUDA kernel for linear layers; torch's own is as fast" in linear["cuda"]
    assert "there is no Triton kernel for linear layers; torch's own is as fast" in linear["triton"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = seqkernels.nn.UserSequenceEncoder(D, 0, HEADS, FF, 1, fusion="none")
        self.stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, HEADS, FF), 1, None, False)
        self.odd = nn.TransformerEncoderLayer(D, HEADS, FF, activation=torch.tanh)
        self.unused = layer()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.norm(self.odd(self.stock(scale * x))[:, 0])
        return self.user(x.unsqueeze(1))  # type: ignore[no-any-return]


def test_a_whole_model() -> None:
    model = Model().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    explanation = seqkernels.explain(model, torch.randn(4, D, D).transpose(1, 2), scale=2.0)
    entries = {entry.name: entry for entry in explanation.entries}
    assert list(entries) == ["user", "stock", "odd", "unused"]
    assert entries["user"].runs == "plain PyTorch"  # it is in training mode
    assert entries["stock"].runs == entries["odd"].runs == "torch.nn"
    if native_module.module is not None:
        assert entries["stock"].why_not == (
            ("seqkernels", ("not swapped: seqkernels.swap(model)",)),
        )
    assert "swap leaves it alone: layer.activation 'tanh'" in entries["odd"].why_not[0][1][0]
    assert entries["unused"].runs == "nothing"
    told = str(explanation)
    assert all(name in told for name in entries)
    assert "these inputs do not reach it" in told
    # Looking changes nothing: no statistics, no flags, no hooks.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(
        module.training for module in model.modules() if module not in {*model.unused.modules()}
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_without_encoders() -> None:
    explanation = seqkernels.explain(nn.Linear(2, 2))
    assert explanation.entries == ()
    assert str(explanation) == "seqkernels.explain: nothing that seqkernels knows was found"


def test_the_module_s_errors_come_through() -> None:
    module = layer()
    with pytest.raises(ValueError, match="last dimension 16"):
        seqkernels.explain(module, torch.randn(2, 5, D + 1))
    assert not module._forward_pre_hooks


class NoPacking:
    """The native ops but those that pack."""

    def __getattr__(self, name: str) -> Any:
        return None if name.startswith("pack_") else getattr(torch.ops.seqkernels, name)


@native
@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_warmup(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer().train()
    module.dropout1.eval()
    flags = [m.training for m in module.modules()]
    inputs: Any = {"tensor": X, "tuple": (X, None), "mapping": {"src": X}}[form]
    seqkernels.warmup(module, inputs)
    assert [m.training for m in module.modules()] == flags
    assert sum(backends.calls.values()) == 1
    monkeypatch.setattr(cpu.CpuBackend, "ops", NoPacking())  # nothing is left to pack
    for m in module.modules():
        m.training = False
    with torch.inference_mode():
        module(X)
    assert sum(backends.calls.values()) == 2
