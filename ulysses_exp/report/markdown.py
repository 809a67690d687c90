"""report.md: the same report where Markdown is read, its pictures beside it."""

from __future__ import annotations

from ulysses_exp.report.pictures import Picture
from ulysses_exp.report.table import Table


def document(title: str, about: str, table: Table, troubles: list[tuple[str, str]], pictures: list[Picture]) -> str:
    """The whole report; its pictures are `<name>.png` in the same folder."""
    lines = [f"# {title}", "", about, ""]
    lines.append("| " + " | ".join(map(_plain, table.titles)) + " |")
    lines.append("| --- |" + " ---: |" * (len(table.titles) - 1))
    lines += ["| " + " | ".join(_plain(text) for _, text in row) + " |" for row in table.rows]
    if troubles:
        lines += ["", "## Not ok", ""]
        lines += [f"- {_plain(run)}: {_plain(reason)}" for run, reason in troubles]
    for picture in pictures:
        lines += ["", f"## {picture.title}", "", picture.caption, "", f"![{picture.title}]({picture.name}.png)"]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
