"""No instruction stands where a processor without it could meet it; the module leaks nothing.

These facts hold for the compiled objects, whatever the sources say: a flag on the wrong file or an
inline function shared between two files would pass every other test on a new processor and crash
on an old one.
"""

from __future__ import annotations

import platform
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.static.native_build import (
    BUILD_DIR,
    disassembly,
    native_library,
    native_module,
    native_objects,
    run_tool,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="reads x86-64 instructions from ELF objects",
)

# Each instruction class and how it shows in AT&T syntax.
CLASSES = {
    "vex": r"\tv(?!err|erw)[a-z0-9]+ ",  # any AVX encoding, 128-bit ones included
    "ymm": r"%ymm",
    "zmm": r"%zmm",
    "bf16": r"\tv(dpbf16ps|cvtne2?ps2bf16)",
    "amx": r"\t(tdp\w+|tileload\w+|tilestored|tilezero|tilerelease|ldtilecfg|sttilecfg)\b",
}

# What the objects of each instruction set may hold; every other object must hold none of this.
ALLOWED = {
    "avx2": {"vex", "ymm"},
    "avx512": {"vex", "ymm", "zmm"},
    "avx512_bf16": {"vex", "ymm", "zmm", "bf16"},
    "amx_bf16": {"vex", "ymm", "zmm", "bf16", "amx"},
}
# What the object of each kernel must hold: one built without its own instructions would be correct,
# and slow. Where an op has no products, tiles have nothing to add.
PRODUCTS = {
    "avx2": r"\tvfmadd\d+ps .*%ymm",
    "avx512": r"\tvfmadd\d+ps .*%zmm",
    "avx512_bf16": r"\tvdpbf16ps .*%zmm",
    "amx_bf16": r"\ttdpbf16ps ",
}
ELEMENTWISE = {
    "avx2": r"\tvmulps .*%ymm",
    "avx512": r"\tvmulps .*%zmm",
    "avx512_bf16": r"\tvcvtneps2bf16 ",
}
REQUIRED = {
    f"{op}_{isa}": pattern
    for op, patterns in (
        ("encoder", PRODUCTS),
        ("linear", PRODUCTS),
        ("resilient_batch_norm", ELEMENTWISE),
    )
    for isa, pattern in patterns.items()
}


def allowed(stem: str) -> set[str]:
    """The classes that an object may hold."""
    if stem not in REQUIRED:
        return set()
    return ALLOWED[max((isa for isa in ALLOWED if stem.endswith(isa)), key=len)]


def test_every_instruction_set_is_known_here() -> None:
    """A new kernel source gets its row in the tables above; a compiler may be too old for some."""
    cache = (BUILD_DIR / "CMakeCache.txt").read_text() if native_objects() else ""
    built = [
        name.lower() for name in re.findall(r"SEQKERNELS_COMPILER_HAS_(\w+):INTERNAL=1", cache)
    ]
    assert "avx2" in built
    assert set(built) <= set(ALLOWED)
    kernels = {stem for stem in native_objects() if stem.endswith(tuple(ALLOWED))}
    assert kernels == {stem for stem in REQUIRED if stem.endswith(tuple(built))}


def test_objects_hold_only_their_own_instructions() -> None:
    found = {
        stem: {name for name, pattern in CLASSES.items() if re.search(pattern, disassembly(stem))}
        for stem in native_objects()
    }
    strangers = {stem: classes - allowed(stem) for stem, classes in found.items()}
    assert not {stem: classes for stem, classes in strangers.items() if classes}


@pytest.mark.parametrize("stem", REQUIRED)
def test_kernels_use_their_instructions(stem: str) -> None:
    if stem not in native_objects():
        pytest.skip(f"this compiler is too old for {stem}")
    assert re.search(REQUIRED[stem], disassembly(stem))


def test_no_shared_code_between_instruction_sets() -> None:
    """The linker keeps one copy of a weak symbol: it could be that of the newest processor."""
    owners = defaultdict(set)
    for stem, path in native_objects().items():
        for line in run_tool("nm", "--format=posix", "--defined-only", path).splitlines():
            symbol, kind = line.split()[:2]
            if kind in "Wu":
                owners[symbol].add(stem)
    shared = {s: stems for s, stems in owners.items() if len(stems) > 1 and stems & set(REQUIRED)}
    assert not shared


def symbols(path: Path, *options: str) -> list[str]:
    lines = run_tool("nm", "--dynamic", *options, path).splitlines()
    return [line.split()[-1].partition("@")[0] for line in lines]


def test_module_exports_its_init_function_alone() -> None:
    assert symbols(native_module(), "--defined-only") == ["PyInit__native"]


def test_library_exports_what_the_module_uses_alone() -> None:
    shown = set(symbols(native_library(), "--defined-only"))
    assert shown == {s for s in symbols(native_module(), "--undefined-only") if "seqkernels" in s}


def test_library_links_to_nothing_of_torch() -> None:
    """It looks the functions of torch's stable ABI up, so that one build serves every torch."""
    foreign = [
        s for s in symbols(native_library(), "--undefined-only") if re.search("torch|c10", s)
    ]
    assert foreign == []


def test_module_and_library_need_only_the_system() -> None:
    """Neither torch, nor a CUDA library or driver, nor an OpenMP run-time of its own."""
    system = r"(libstdc\+\+|libgcc_s|libm|libc|libpthread|librt|libdl|ld-linux-x86-64)\.so\.\d+"
    for path, more in ((native_module(), ["libseqkernels.so"]), (native_library(), [])):
        headers = run_tool("objdump", "--private-headers", path)
        needed = re.findall(r"NEEDED\s+(\S+)", headers)
        assert [name for name in needed if not re.fullmatch(system, name)] == more
