"""These tests want Triton's interpreter, which is chosen when Triton is imported.

So they run in processes of their own (`tests/triton/test_interpreted.py`), or by hand::

    TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted
"""

import os
from collections import Counter
from pathlib import Path

import pytest

#: Interpreting takes seconds per test, so `make test` runs one test in fifteen of a file.
STEP = 15  # odd, as parameters that alternate are
HERE = Path(__file__).parent
WHOLE = ("test_interpreter.py",)

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:  # of the whole run
        if item.path.parent != HERE or item.path.name in WHOLE:
            continue
        if seen[item.path.name] % STEP:
            item.add_marker(pytest.mark.exhaustive)
        seen[item.path.name] += 1
