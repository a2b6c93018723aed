"""The environment variables: read once, here, and overridden in a block."""

import os
import subprocess
import sys
import threading

import pytest

from seqkernels import settings
from seqkernels.settings import Settings


@pytest.fixture
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_clean")
def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.from_environment() == Settings("auto", None, "0")
    assert not Settings().is_strict
    for name in settings.VARIABLES:
        monkeypatch.setenv(name, "")
    assert settings.from_environment() == Settings("auto", None, "0")


@pytest.mark.usefixtures("_clean")
def test_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQKERNELS_BACKEND", "reference")
    monkeypatch.setenv("SEQKERNELS_ISA", "avx2")
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    assert settings.from_environment() == Settings("reference", "avx2", "1")
    assert settings.environment()["SEQKERNELS_ISA"] == "avx2"


@pytest.mark.parametrize(
    ("text", "strict"), [("0", False), ("1", True), ("false", False), ("TRUE", True)]
)
def test_strict(text: str, strict: bool) -> None:
    assert Settings(strict=text).is_strict == strict


def test_strict_that_is_neither() -> None:
    with pytest.raises(ValueError, match="SEQKERNELS_STRICT: expected 0 or 1, got 'maybe'"):
        assert Settings(strict="maybe").is_strict


def test_override_nests_and_ends() -> None:
    before = settings.current
    with settings.override(backend="cpu", strict=True) as outer:
        assert settings.current is outer
        assert (outer.backend, outer.is_strict) == ("cpu", True)
        with settings.override(isa="portable", strict=False) as inner:
            assert (inner.backend, inner.isa, inner.is_strict) == ("cpu", "portable", False)
        assert settings.current is outer
    assert settings.current is before
    with pytest.raises(KeyError), settings.override(backend="reference"):
        raise KeyError
    assert settings.current is before


def test_override_holds_in_other_threads() -> None:
    seen = []
    with settings.override(backend="reference"):
        thread = threading.Thread(target=lambda: seen.append(settings.current.backend))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_the_environment_reaches_a_call() -> None:
    code = (
        "import torch, seqkernels\n"
        "layer = seqkernels.nn.TransformerEncoderLayer(8, 2, 8).eval()\n"
        "with torch.inference_mode(): layer(torch.randn(3, 1, 8))\n"
        "print(dict(seqkernels.backends.calls))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SEQKERNELS_BACKEND": "reference", "SEQKERNELS_STRICT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "{'reference': 1}"
    assert not result.stderr
