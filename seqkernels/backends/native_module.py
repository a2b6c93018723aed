"""The native module, or why there is none."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

module: Any = None
import_error: str | None = None  # why there is no native module; the whole text
try:
    module = importlib.import_module("seqkernels._native")
except ModuleNotFoundError as error:
    import_error = (
        f"the native module was not built ({error}); install the package with a C++20 compiler"
    )
except Exception as error:  # a broken build must not keep the reference from working
    import_error = (
        "the native module is there but cannot be loaded: "
        + "".join(traceback.format_exception_only(error)).strip()
        + "; rebuild it with `pip install --force-reinstall --no-deps .`"
    )
