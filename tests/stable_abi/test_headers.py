"""The functions of torch that the library declares are those of torch's headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.static.project import ROOT

INCLUDE = Path(torch.__file__).parent / "include"
COMPILER = os.environ.get("CXX") or shutil.which("c++")
CHECK = """
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include "torch/stable_abi.h"

#include <type_traits>

using namespace seqkernels::torch_abi;
#define SAME(name, ...) static_assert(std::is_same_v<decltype(Functions::name), decltype(&::name)>);
SEQKERNELS_TORCH_FUNCTIONS(SAME)
static_assert(std::is_same_v<CudaStreamFunction, decltype(&::aoti_torch_get_current_cuda_stream)>);
static_assert(std::is_same_v<Value, StableIValue>);
"""


def compiled(source: str) -> subprocess.CompletedProcess[str]:
    assert COMPILER
    headers = [f"-I{ROOT / 'csrc'}", f"-isystem{INCLUDE}"]
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-x", "c++", *headers, "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_declarations_are_those_of_torch() -> None:
    done = compiled(CHECK)
    assert done.returncode == 0, done.stderr
    # A function declared with another type would be called wrongly without a word.
    planted = CHECK.replace("SAME(name, ...) ", "SAME(name, ...) static_assert(false);", 1)
    assert compiled(planted).returncode != 0
    wrong = CHECK.replace(
        "std::is_same_v<Value, StableIValue>", "std::is_same_v<int, StableIValue>"
    )
    assert compiled(wrong).returncode != 0


def test_every_function_is_there_from_the_lowest_torch_on() -> None:
    """None of those that a newer torch brought: their shims stand behind a version."""
    header = (INCLUDE / "torch/csrc/stable/c/shim.h").read_text()
    used = re.findall(r"\bX\((\w+),", (ROOT / "csrc/torch/stable_abi.h").read_text())
    assert "torch_library_impl" in used
    newer = header[header.index("The beginning of all shims added in 2.11.0 onwards") :]
    assert not [name for name in used if re.search(rf"\b{name}\(", newer)]
