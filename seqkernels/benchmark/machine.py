"""What a result depends on besides the code: processor, threads, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import seqkernels
from seqkernels.backends import cpu, native_module


def _cpuinfo(key: str) -> str | None:
    """The first value of a key in Linux's /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _git(*arguments: str) -> str | None:
    """Git's answer about the source tree this package lies in, if it lies in one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_info() -> dict[str, object]:
    """Everything a results file has to say about where it comes from; values are JSON.

    Examples
    --------
    >>> from seqkernels.benchmark import machine_info
    >>> machine_info()["seqkernels"] == seqkernels.__version__
    True
    """
    native = native_module.module
    table = cpu.isa_table()
    mhz = _cpuinfo("cpu MHz")
    model = tuple(_cpuinfo(key) for key in ("vendor_id", "cpu family", "model", "stepping"))
    load = _cpuload()
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "commit_changed": None if changed is None else bool(changed),
        "processor": (native.processor() if native else None)
        or _cpuinfo("model name")
        or platform.processor(),
        "processor_model": " ".join(part or "?" for part in model),
        "architecture": platform.machine(),
        "clock_ghz": float(mhz) / 1000 if mhz else None,
        "load": load,
        "cores": torch.get_num_threads(),
        "isa": next((s.name for s in table if s.chosen), None),
        "isa_runnable": [s.name for s in table if s.runnable],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "seqkernels": seqkernels.__version__,
        "native_build": dict(native.build_info()) if native else native_module.import_error,
        "torch": torch.__version__,
        "openvino": _version("openvino"),
        "gpu": _gpu(),
        "triton": _version("triton"),
    }


def _gpu() -> dict[str, object] | None:
    """The current CUDA device, if there is one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "cuda": torch.version.cuda,
        "flash_attn": _version("flash-attn"),
        "xformers": _version("xformers"),
    }


def _cpuload() -> float | None:
    """Processes that want to run, averaged over the last minute: others disturb a measurement."""
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return None
