"""Lines of a summary: a label, and what is said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

STATUS_STYLE = {
    "ok": "green", "failed": "bold red", "interrupted": "yellow", "skipped": "yellow", "running": "cyan",
}  # fmt: skip

Fact = tuple[str, str | Text]


def trouble(name: str, stage: Mapping[str, Any]) -> list[Fact]:
    """Why the stage called `name` is not ok; nothing where it is."""
    status = str(stage.get("status", "?"))
    if status == "ok":
        return []
    return [(name, Text(f"{status}: {stage.get('reason', 'no reason given')}", style=STATUS_STYLE.get(status, "")))]
