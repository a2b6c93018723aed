"""``python -m seqkernels info``: what was built, what this machine can run, what is chosen."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from rich.console import Console

import seqkernels
from seqkernels import backends, settings
from seqkernels.backends import cpu, native_module
from seqkernels.backends.cuda import not_built_reason
from seqkernels.errors import BackendUnavailableError
from seqkernels.tables import make

_CASES = (
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    ("cpu", torch.float64),
    ("cuda", torch.float32),
    ("cuda", torch.bfloat16),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the tables; a broken installation is shown, not an error."""
    console = Console()
    width = max(console.width, 100) if not console.is_terminal else None
    for title, columns, rows in tables():
        console.print(make(title, columns, rows), width=width)
        console.print()
    return 0


def tables() -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, columns and rows of each table."""
    return [
        ("seqkernels", ("what", "value"), _versions()),
        ("Native module", ("what", "value"), _native_module()),
        (
            "CPU instruction sets, best first",
            ("name", "this machine", "chosen", "because"),
            _instruction_sets(),
        ),
        ("Backends for the encoder", ("input", "runs", "not", "because"), _backends()),
        ("Settings (environment)", ("variable", "set to", "in effect"), _settings()),
    ]


def _versions() -> list[tuple[str, ...]]:
    return [
        ("seqkernels", seqkernels.__version__),
        ("torch", torch.__version__),
        ("torch threads", str(torch.get_num_threads())),
        ("Python", platform.python_version()),
        ("platform", platform.platform()),
    ]


def _native_module() -> list[tuple[str, ...]]:
    native = native_module.module
    if native is None:
        return [("built", "no usable module"), ("reason", native_module.import_error or "unknown")]
    return [
        ("built", "yes"),
        ("file", str(native.__file__)),
        ("library", str(Path(native.__file__).parent / "lib" / "libseqkernels.so")),
        ("processor", native.processor()),
        *native.build_info().items(),
        ("CUDA kernels", getattr(native, "cuda_build", None) or not_built_reason()),
    ]


def _instruction_sets() -> list[tuple[str, ...]]:
    if native_module.module is None:
        return [("(none)", "", "", "there is no native module")]
    try:
        return [
            (
                status.name,
                "runs it" if status.runnable else "cannot",
                "yes" if status.chosen else "",
                "\n".join(status.reasons),
            )
            for status in cpu.isa_table()
        ]
    except ValueError as error:
        return [("(none)", "", "", str(error))]


def _backends() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for device, dtype in _CASES:
        case = f"{device}, {str(dtype).removeprefix('torch.')}"
        try:
            choice = backends.resolve(backends.Problem("encoder", device, dtype), "auto")
        except (ValueError, BackendUnavailableError) as error:
            rows.append((case, "an error", "", str(error)))
            continue
        rejected = choice.rejected or (("", ()),)
        for position, (name, reasons) in enumerate(rejected):
            shown = (case, choice.label) if position == 0 else ("", "")
            rows.append((*shown, name, "\n".join(reasons)))
    return rows


def _settings() -> list[tuple[str, ...]]:
    now = settings.current
    try:
        strict = "yes" if now.is_strict else "no"
    except ValueError as error:
        strict = str(error)
    effect = (now.backend, now.isa or "(no limit)", strict)
    variables = settings.environment().items()
    return [
        (name, "(unset)" if value is None else value, effective)
        for (name, value), effective in zip(variables, effect, strict=True)
    ]
