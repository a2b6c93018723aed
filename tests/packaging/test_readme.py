"""The examples of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.static.project import ROOT

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("code", EXAMPLES)
def test_readme_example(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where one of them saves a program
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_is_an_example() -> None:
    assert EXAMPLES
