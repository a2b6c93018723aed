"""The torch library the ops are registered in."""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "seqkernels"

#: Kept for the life of the process: the ops vanish with it.
LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
