"""Tables as text, the same in a terminal, a log and a test."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 120


def make(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A rich table; cells are shown as they are, markup in them has no meaning."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def as_text(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as plain text without colours."""
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None, force_terminal=False).print(
        make(title, columns, rows)
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
