"""Kernels with a mistake planted in them, which the tests have to catch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from seqkernels.backends.triton import kernels

NAMES = ("tokens", "rows", "attention", "request_scoring", "tail")  # each imports some before it


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    case: dict[str, Any]  # fields of the EncoderCase that shows it


def plant(fault: Fault | None, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Load the kernels from copies, one of them with the fault."""
    assert kernels.__file__ is not None
    for name in NAMES:
        text = (Path(kernels.__file__).parent / f"{name}.py").read_text()
        if fault is not None and name == fault.file:
            assert fault.old in text, "the fault fits the source no more"
            text = text.replace(fault.old, fault.new)
        copy = folder / f"{name}.py"
        copy.write_text(text)
        module_name = f"{kernels.__name__}.{name}"
        spec = importlib.util.spec_from_file_location(module_name, copy)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, module_name, module)
        spec.loader.exec_module(module)
