"""Which of many cases `make test` runs; `make test-all` runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters: all but every ``step``-th are exhaustive."""
    return [
        case if index % step == 0 else pytest.param(case, marks=pytest.mark.exhaustive)
        for index, case in enumerate(cases)
    ]
