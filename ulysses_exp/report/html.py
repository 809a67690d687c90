"""report.html: one file that shows everything without a network, on paper too."""

from __future__ import annotations

import io
import math
import re
from html import escape
from typing import Any

import matplotlib

from ulysses_exp.report.pictures import Picture
from ulysses_exp.report.style import RC
from ulysses_exp.report.table import Table

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #222; background: #fff;
       max-width: 76rem; margin: 2.5rem auto; padding: 0 1.5rem }
h1 { font-size: 1.6rem; margin: 0 0 .2rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem }
p.note, figcaption { color: #666; margin: 0 0 .8rem }
nav a { margin-right: 1.1em; color: #0072b2; text-decoration: none } nav { margin: .8rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: .6rem 0 }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
td.reason { text-align: left; white-space: normal }
thead th { border-bottom: 2px solid #222; vertical-align: bottom }
th button { all: unset; cursor: pointer } th button:focus-visible { outline: 2px solid #0072b2 }
th[aria-sort=ascending] button::after { content: " \\25B2" }
th[aria-sort=descending] button::after { content: " \\25BC" }
tbody tr:hover { background: #f4f7fa }
.ok { color: #00664a } .failed, .interrupted { color: #a03c00; font-weight: 600 } .skipped, .unfinished { color: #666 }
figure { margin: 0 } figure svg { max-width: 100%; height: auto }
@media print { body { margin: 0; max-width: none; font-size: 10pt } nav { display: none }
  section { break-inside: avoid } .wide { overflow: visible } table { font-size: 7.5pt }
  th, td { padding: .15rem .35rem } }
"""

_SORT = """
for (const head of document.querySelectorAll("table.sortable th")) head.firstChild.onclick = () => {
  const table = head.closest("table"), column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.value, number = row => parseFloat(key(row));
  const order = (a, b) => key(a) === "" ? 1 : key(b) === "" ? -1 : (down ? -1 : 1) *
    (isNaN(number(a) + number(b)) ? key(a).localeCompare(key(b), "en", {numeric: true}) : number(a) - number(b));
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
};
"""


def page(title: str, about: str, table: Table, troubles: list[tuple[str, str]], pictures: list[Picture]) -> str:
    """The whole report as one HTML document.

    Args:
        title: heading and window title.
        about: a line below it, plain text.
        table: the figures, sortable by a click on a heading.
        troubles: (run, reason) for what is not ok.
        pictures: inlined as SVG.
    """
    links = "".join(f'<a href="#{p.name}">{escape(p.title)}</a>' for p in pictures)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{escape(title)}</h1><p class="note">{escape(about)}</p><nav>{links}</nav>',
        '<section><div class="wide">',
        _table(table),
        "</div></section>",
    ]
    if troubles:
        rows = "".join(f'<tr><td>{escape(run)}</td><td class="reason">{escape(why)}</td></tr>' for run, why in troubles)
        parts.append(f"<section><h2>Not ok</h2><table><tbody>{rows}</tbody></table></section>")
    for picture in pictures:
        parts.append(
            f'<section id="{picture.name}"><h2>{escape(picture.title)}</h2><figure>'
            f"<figcaption>{escape(picture.caption)}</figcaption>{svg(picture)}</figure></section>"
        )
    parts.append(f"<script>{_SORT}</script></body></html>\n")
    return "\n".join(parts)


def svg(picture: Picture) -> str:
    """The picture as an SVG element, its ids made its own, so that several share a page."""
    file = io.StringIO()
    with matplotlib.rc_context(RC):
        picture.figure.savefig(
            file, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{picture.name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{picture.name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.title)}" ', 1)


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col"><button>{escape(title)}</button></th>' for title in table.titles)
    rows = "".join("<tr>" + "".join(_cell(*cell) for cell in row) + "</tr>\n" for row in table.rows)
    return f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table>'


def _cell(value: Any, text: str) -> str:
    if isinstance(value, tuple):
        value = value[0] / value[1]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        value = ""
    style = f' class="{text}"' if text in ("ok", "failed", "interrupted", "skipped", "unfinished") else ""
    return f'<td data-value="{escape(str(value))}"{style}>{escape(text)}</td>'
