"""The examples in docstrings do what they show."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest
import torch

import seqkernels


def modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(seqkernels.__path__, "seqkernels.")]
    return [n for n in names if n.rpartition(".")[2] not in ("__main__", "_native")]


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    try:
        module: ModuleType = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("seqkernels"):
            raise
        pytest.skip(f"needs {error.name}")
    assert doctest.testmod(module).failed == 0
