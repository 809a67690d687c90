"""A table on the terminal whose texts are shown as they are written: names and errors are no markup."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ulysses_exp.report.plain import plain


class PlainTable(Table):
    """rich's table; a `str` in it is text without control characters, not rich's markup."""

    def add_column(self, header: RenderableType = "", *rest: Any, **options: Any) -> None:
        super().add_column(_text(header), *rest, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*map(_text, cells), **options)


#: What is shown below the facts: a table, if there is one, and remarks
Shown = tuple[PlainTable | None, list[str]]


def figures_table(first: str, *others: str) -> PlainTable:
    """An empty table with a column of names and columns of figures."""
    table = PlainTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _text(cell: Any) -> Any:
    return Text(plain(cell)) if isinstance(cell, str) else cell
