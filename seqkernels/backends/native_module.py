"""The native module, or why there is none."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import torch  # noqa: F401  which the library looks for when it is loaded


def missing_reason(error: ModuleNotFoundError, package: Path, path: list[str] | None = None) -> str:
    """The reason as a sentence.

    Parameters
    ----------
    error : ModuleNotFoundError
        What the import raised.
    package : Path
        The folder of the package that is running.
    path : list of str, optional
        Where Python looks for modules; ``sys.path`` by default.
    """
    source = package.parent
    if not (source / "CMakeLists.txt").is_file():
        return (
            f"the native module was not built ({error}); install the package with a C++20 compiler"
        )
    build = "`make native` or `pip install --editable .` builds it there"
    for folder in sys.path if path is None else path:
        installed = Path(folder or ".").resolve() / package.name
        if installed != package.resolve() and any(installed.glob("_native*.so")):
            return (
                f"Python was started in the source folder {source}, which has no native module and "
                f"hides the package installed in {installed}: start it in another folder, or build "
                f"the module in this one; {build}"
            )
    return f"the native module was not built in the source folder {source}; {build}"


module: Any = None
import_error: str | None = None  # why there is no native module; the whole text
try:
    module = importlib.import_module("seqkernels._native")
except ModuleNotFoundError as error:
    import_error = missing_reason(error, Path(__file__).resolve().parents[1])
except Exception as error:  # a broken build must not keep the reference from working
    import_error = (
        "the native module is there but cannot be loaded: "
        + "".join(traceback.format_exception_only(error)).strip()
        + "; rebuild it with `pip install --force-reinstall --no-deps .`"
    )
if module is not None:
    module.withdraw_ops_on_weights()  # seqkernels.ops registers them for every backend
if module is not None and module.ops_error():
    import_error = f"the native library could not register its ops: {module.ops_error()}"
    module = None
