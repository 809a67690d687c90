"""report.md: the same report where Markdown is read, its pictures beside it."""

from __future__ import annotations

import re

from ulysses_exp.report.page import Page

#: More rows are in report.html only
ROWS, TROUBLES = 50, 50

#: What would begin markup in the middle of a line: HTML, links, pictures, code, emphasis, formulas, cells
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def document(page: Page) -> str:
    """The whole report; its pictures are `<name>.png` in the same folder."""
    table = page.table
    lines = [f"# {escape(page.title)}", "", escape(page.about), ""]
    lines += [f"- {escape(text)}" for text in page.highlights] + [""] * bool(page.highlights)
    lines.append("| " + " | ".join(map(escape, table.titles)) + " |")
    lines.append("| --- |" + " ---: |" * (len(table.titles) - 1))
    lines += ["| " + " | ".join(escape(text) for _, text in row) + " |" for row in table.rows[:ROWS]]
    if len(table.rows) > ROWS:
        lines += ["", f"{len(table.rows) - ROWS:,} more in report.html, which sorts and filters them."]
    if page.troubles:
        lines += ["", "## Not ok", ""]
        lines += [f"- {escape(run)}: {escape(reason)}" for run, reason in page.troubles[:TROUBLES]]
        if len(page.troubles) > TROUBLES:
            lines.append(f"- {len(page.troubles) - TROUBLES:,} more in report.html")
    for picture in page.pictures:
        lines += ["", f"## {picture.title}", "", escape(picture.caption), ""]
        lines.append(f"![{picture.title}]({picture.name}.png)")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """`text` in one line that Markdown shows as it is written, in a cell of a table, too."""
    text = "".join(_HTML.get(character, character) for character in " ".join(text.split()))
    return _MARKUP.sub(r"\\\g<0>", text)
