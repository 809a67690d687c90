"""report.html: one file that shows everything without a network, on paper and without scripts, too."""

from __future__ import annotations

import math
from html import escape
from importlib.resources import files
from typing import Any

from ulysses_exp.report.page import Page
from ulysses_exp.report.pictures import svg
from ulysses_exp.report.shape import STATUSES
from ulysses_exp.report.table import Table

_TALL = 30  # rows that the page shows without a scroll bar of the table's own
_CLASSES = {*STATUSES, "unfinished", "damaged"}


def document(page: Page) -> str:
    """The whole report as one HTML document."""
    assets = files("ulysses_exp.report")
    links = "".join(f'<a href="#{p.name}">{escape(p.title)}</a>' for p in page.pictures)
    notes = "".join(f"<li>{_led(text)}</li>" for text in page.highlights)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(page.title)}</title><style>{(assets / 'page.css').read_text()}</style></head><body>",
        f'<h1>{escape(page.title)}</h1><p class="note">{escape(page.about)}</p>',
        f'<ul class="highlights">{notes}</ul>' if notes else "",
        f"<nav>{links}</nav>" if links else "",
        '<section id="runs">',
        _table(page.table, page.sorted_by),
        "</section>",
    ]
    if page.troubles:
        rows = "".join(
            f'<tr><td>{escape(run)}</td><td class="reason">{escape(why)}</td></tr>' for run, why in page.troubles
        )
        tall = " tall" if len(page.troubles) > _TALL else ""
        parts.append(
            f'<section id="not-ok"><h2>Not ok</h2><div class="wide{tall}" tabindex="0" role="region" '
            f'aria-label="Not ok"><table><tbody>{rows}</tbody></table></div></section>'
        )
    for picture in page.pictures:
        parts.append(
            f'<section id="{picture.name}"><h2>{escape(picture.title)}</h2><figure>'
            f"<figcaption>{escape(picture.caption)}</figcaption>{svg(picture)}</figure></section>"
        )
    parts.append(f"<script>{(assets / 'page.js').read_text()}</script></body></html>\n")
    return "\n".join(parts)


def _led(text: str) -> str:
    """A line with what stands before its colon set off."""
    name, _, rest = text.partition(": ")
    return f"<b>{escape(name)}</b> {escape(rest)}"


def _table(table: Table, sorted_by: str) -> str:
    """The runs. End tags of rows and cells are left out, as HTML allows: of a thousand runs they are half a page."""
    heads = []
    for number, title in enumerate(table.titles):
        kind = ' data-choice=""' if number <= table.settings or title == "status" else ""
        order = ""
        if title == sorted_by:
            values = [value for row in table.rows if isinstance(value := row[number][0], (int, float))]
            order = f' aria-sort="{"ascending" if values and values[0] <= values[-1] else "descending"}"'
        heads.append(f'<th scope="col"{kind}{order}><button type="button">{escape(title)}</button></th>')
    commands = table.commands or [None] * len(table.rows)
    rows = "\n".join(
        "<tr>" + "".join(_cell(*cell, command if column == 0 else None) for column, cell in enumerate(row))
        for row, command in zip(table.rows, commands, strict=True)
    )
    tall = " tall" if len(table.rows) > _TALL else ""
    return (
        f'<div class="wide{tall}" tabindex="0" role="region" aria-label="Runs"><table class="sortable"><thead><tr>'
        f"{''.join(heads)}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(value: Any, text: str, command: str | None) -> str:
    """A cell; what one sorts by where that is not its text, and the command of the run as its title."""
    if isinstance(value, tuple):
        value = value[0] / value[1]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        key = ""
    else:
        key = f"{value:.7g}" if isinstance(value, float) else str(value)
    attributes = "" if key == text else f' data-v="{escape(key)}"'
    if text in _CLASSES:
        attributes += f' class="{text}"'
    if command:
        attributes += f' title="{escape(command)}"'
    return f"<td{attributes}>{escape(text)}"
