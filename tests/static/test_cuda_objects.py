"""Gates on what ptxas made of the CUDA kernels; the design documents say the same."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.static import cuda_document as document
from tests.static.cuda_objects import (
    ARCHITECTURES,
    EVERYDAY,
    REFERENCE_CLASS,
    REFERENCE_WARPS,
    build_kernels,
    cuda_objects,
    executed,
    nvcc_release,
    opcodes,
    usage,
)
from tests.static.project import ROOT
from tests.static.sass import count, share_of_moves

OBJECTS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ELEMENTWISE = {"resilient_batch_norm_kernel", "split_tokens_kernel"}  # no products

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="NVIDIA's compiler from PyPI is that of x86-64 Linux",
)
each_architecture = pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[] if arch in EVERYDAY else pytest.mark.exhaustive)
        for arch in ARCHITECTURES
    ],
)
each_object = pytest.mark.parametrize("name", OBJECTS)


@each_architecture
def test_every_source_is_compiled(arch: str) -> None:
    assert sorted(cuda_objects(arch)) == OBJECTS


@each_object
@each_architecture
def test_every_architecture_has_every_kernel(arch: str, name: str) -> None:
    assert usage(name, arch)
    assert set(usage(name, arch)) == set(usage(name, ARCHITECTURES[0]))


@each_object
@each_architecture
def test_nothing_is_spilled(arch: str, name: str) -> None:
    for kernel, used in usage(name, arch).items():
        assert (used.stack, used.local) == (0, 0), kernel
    for kernel, code in opcodes(name, arch).items():
        assert not count(code, "LDL") + count(code, "STL"), kernel


@each_object
@each_architecture
def test_warps_stay_together(arch: str, name: str) -> None:
    """Operations of a warp have no second version for lanes that went different ways."""
    for kernel, code in opcodes(name, arch).items():
        assert not count(code, "BRA.DIV"), kernel


@each_object
@each_architecture
def test_products_run_on_tensor_cores(arch: str, name: str) -> None:
    for kernel, code in opcodes(name, arch).items():
        assert (count(code, "HMMA") == 0) == (kernel.partition("<")[0] in ELEMENTWISE), kernel
        # Moves between registers say that values are not where they are wanted.
        assert share_of_moves(code) <= 0.15, kernel


@each_architecture
def test_the_reference_problem_executes_the_products_it_needs(arch: str) -> None:
    """By the machine code, weighted by trips of its loops; the emulation counts the same."""
    code = executed(arch)
    by_warps = [REFERENCE_WARPS * count(code, name) for name in ("HMMA.16816", "HMMA.1688")]
    assert by_warps == [document.of_a_sequence(f"mma_m16n8k{k}") for k in (16, 8)]
    work = document.products(*by_warps)
    assert document.PRODUCTS_NEEDED <= work <= 1.15 * document.PRODUCTS_NEEDED
    assert share_of_moves(code) <= 0.15
    assert REFERENCE_WARPS * count(code, "LDSM") == document.of_a_sequence("ldmatrix")


@each_architecture
def test_two_blocks_fit_a_multiprocessor(arch: str) -> None:
    """By registers: 7 warps of the reference problem, 8 of attention to narrow heads."""
    kernels = {k: u for name in OBJECTS for k, u in usage(name, arch).items()}
    exact = [u.registers for k, u in kernels.items() if REFERENCE_CLASS in k]
    assert len(exact) == 3  # an encoder; a request's user and candidate
    name = "split_attention_kernel<SplitAttentionClass<{}>>"
    narrow = [kernels[name.format(rows)].registers for rows in (16, 32, 48, 64)]
    assert max(exact + narrow) <= 128


@each_object
@each_architecture
def test_shared_memory_comes_from_the_plan_alone(arch: str, name: str) -> None:
    """`tests/cpp` holds every plan to the chips' limits: nothing may come on top of it."""
    for kernel, used in usage(name, arch).items():
        assert used.shared <= 1024, kernel  # what the system takes, on newer architectures


def test_every_object_has_its_table() -> None:
    named = {name.partition(" ")[2] for name in document.tables() if name.startswith("resources")}
    assert named == set(OBJECTS), "`<!-- made: resources NAME -->` in docs/design makes a table"


@pytest.mark.exhaustive  # they show every architecture
@pytest.mark.parametrize("path", sorted(set(document.tables().values())), ids=lambda p: p.stem)
def test_tables_are_current(path: Path) -> None:
    assert document.documented_release() == nvcc_release()
    assert path.read_text() == document.made(path.read_text()), (
        "`python -m tests.static.cuda_document` writes the tables anew"
    )


WARNED = {
    "an unused variable": (
        "__global__ void kernel(float* x) { int unused; x[0] = 1.0f; }",
        "never referenced",
    ),
    "spilled registers": (
        """__global__ void __launch_bounds__(1024, 2) kernel(const float* x, float* y) {
          float v[96];
        #pragma unroll
          for (int i = 0; i < 96; ++i) v[i] = x[1024 * i + threadIdx.x];
          __syncthreads();
        #pragma unroll
          for (int i = 0; i < 96; ++i) y[1024 * i + threadIdx.x] = v[95 - i] * v[7 * i % 96];
        }""",
        "Registers are spilled",
    ),
    "local memory": (
        """__global__ void kernel(const int* x, float* y) {
          float v[64];
          for (int i = 0; i < 64; ++i) v[x[i] & 63] = y[i];
          for (int i = 0; i < 64; ++i) y[i] = v[x[64 + i] & 63];
        }""",
        "Local memory used",
    ),
    "nothing": ("__global__ void kernel(float* x) { x[0] = 1.0f; }", ""),
}


@pytest.mark.parametrize("what", WARNED)
def test_warnings_are_errors(what: str, tmp_path: Path) -> None:
    """Of nvcc and of ptxas, with the flags of a development build; for one architecture."""
    source, message = WARNED[what]
    (tmp_path / "planted.cu").write_text(source)
    command = [*compiler_flags(), "-c", str(tmp_path / "planted.cu"), "-o", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == bool(message), done.stdout + done.stderr
    assert message in done.stdout + done.stderr


def compiler_flags() -> list[str]:
    """nvcc and what CMake gives it for the encoder, of the architectures only sm_80."""
    entries = json.loads((build_kernels(EVERYDAY) / "compile_commands.json").read_text())
    (entry,) = [e for e in entries if e["file"].endswith("csrc/cuda/encoder.cu")]
    words = [w for w in shlex.split(entry["command"]) if not w.startswith("--generate-code")]
    assert "--Werror=all-warnings" in words
    return [*words[: words.index("-x")], "-arch=sm_80"]
