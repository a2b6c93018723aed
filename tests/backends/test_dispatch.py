"""Which backend and instruction set run, what is told of a fallback, and what forbids one."""

import logging
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from seqkernels import BackendUnavailableError, backends, settings
from seqkernels.backends import cpu, native_module
from tests.ops.encoder_call import arguments, call

native = pytest.mark.skipif(native_module.module is None, reason="there is no native module")
X = arguments()["x"]


@pytest.fixture(autouse=True)
def _nothing_told_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_reported", set())
    monkeypatch.setattr(backends, "_choices_for", None)
    backends.calls.clear()


@native
def test_auto_takes_the_best_instruction_set() -> None:
    best = next(s.name for s in cpu.isa_table() if s.chosen)
    with torch.inference_mode():
        call()
        call(x=X.bfloat16())
        call(backend="cpu")
    assert dict(backends.calls) == {f"cpu/{best}": 3}


def test_reference_is_no_fallback_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode(), settings.override(strict=True):
        call(backend="reference")
        with settings.override(backend="reference"):
            call()
            call(x=X.clone().requires_grad_())
    assert dict(backends.calls) == {"reference": 3}
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_fallback_is_told_once_for_each_kind(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            call(x=X.to(dtype))
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert f"dtype {dtype}, it takes float32 and bfloat16" in caplog.text
        assert "encoder: runs the plain PyTorch definition" in caplog.text
        other = torch.float64 if dtype == torch.float16 else torch.float16
        call(x=X.to(other))
    assert len(caplog.records) == 2
    assert backends.calls["reference"] == 4


def test_gradients_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        call(x=X.clone().requires_grad_())
    assert len(caplog.records) == 1
    assert "gradients are to be recorded" in caplog.text
    assert "inference_mode" in caplog.text


def test_strict_settings_make_every_fallback_an_error() -> None:
    with settings.override(strict=True):
        with torch.inference_mode(), pytest.raises(BackendUnavailableError) as caught:
            call(x=X.double())
        assert "SEQKERNELS_STRICT=1" in str(caught.value)
        assert "dtype torch.float64" in str(caught.value)
        with pytest.raises(BackendUnavailableError, match="gradients are to be recorded"):
            call(x=X.clone().requires_grad_())
        with torch.inference_mode(), pytest.raises(BackendUnavailableError):
            call(x=X.double())  # not only the first time
    with torch.inference_mode():
        call(x=X.double())


@native
@pytest.mark.parametrize("cap", [s.name for s in cpu.isa_table()])
def test_the_named_instruction_set_caps_the_choice(cap: str) -> None:
    with settings.override(isa=cap), torch.inference_mode():
        call()
        table = cpu.isa_table()
    (label,) = backends.calls
    names = [s.name for s in table]
    used = label.removeprefix("cpu/")
    assert names.index(used) >= names.index(cap)
    if next(s for s in table if s.name == cap).runnable:
        assert used == cap
    for status in table:
        assert status.chosen == (status.name == used)
        assert status.chosen != bool(status.reasons)
        if names.index(status.name) < names.index(cap):
            assert f"SEQKERNELS_ISA={cap} allows nothing better" in status.reasons


@native
def test_emulation_is_never_chosen_by_itself() -> None:
    emulated = [s for s in cpu.isa_table() if s.name.endswith("_emulated")]
    assert all("used only when SEQKERNELS_ISA names it" in "; ".join(s.reasons) for s in emulated)


@native
def test_settings_take_effect_at_once() -> None:
    with torch.inference_mode():
        call()
        with settings.override(isa="portable"):
            call()
            with settings.override(backend="reference"):
                call()
            call()
        call()
    assert backends.calls["cpu/portable"] == 2
    assert backends.calls["reference"] == 1
    assert sum(backends.calls.values()) == 5


def run_python(code: str, *, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert result.returncode == status, result.stderr
    return result


BROKEN = """
    import sys, importlib.abc, importlib.machinery
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "seqkernels._native":
                raise {error}
    sys.meta_path.insert(0, Finder())
    import torch, seqkernels
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("ModuleNotFoundError('No module named seqkernels._native')", "was not built"),
        ("ImportError('undefined symbol: _ZN6python')", "undefined symbol: _ZN6python"),
        ("SystemError('initialization failed')", "initialization failed"),
    ],
)
def test_without_a_usable_native_module(error: str, told: str) -> None:
    code = (
        BROKEN.format(error=error)
        + """
    layer = seqkernels.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    with torch.inference_mode():
        for _ in range(2):
            assert layer(torch.randn(2, 3, 8)).isfinite().all()
    assert not seqkernels.backends.calls  # torch's forward is faster than the reference
    try:
        seqkernels.swap(torch.nn.TransformerEncoderLayer(8, 2, 8), backend="cpu")
    except seqkernels.BackendUnavailableError as unavailable:
        print(unavailable)
    from seqkernels.__main__ import main
    assert main(["info"]) == 0
    """
    )
    result = run_python(code)
    assert result.stderr.count("encoder: runs the plain PyTorch definition") == 1
    assert told in result.stderr
    unavailable, _, info = result.stdout.partition("Native module")
    assert "swap: backend 'cpu' cannot run:" in unavailable
    assert told in unavailable
    assert told in " ".join(info.split())


def test_without_torch_there_is_one_clear_message() -> None:
    code = """
    import sys
    sys.modules["torch"] = None  # as if it were not installed
    try:
        import seqkernels
    except ImportError as error:
        print(error)
        assert error.__cause__ is None
        assert error.__suppress_context__
    """
    assert "seqkernels needs PyTorch, which is not installed here" in run_python(code).stdout
