"""Text that came from a run, a library or a folder's name, made safe to show: no control character survives."""

from __future__ import annotations

import re
from typing import Any

#: Terminal sequences: colours and cursors (CSI), titles and links (OSC), other strings, single letters
_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
#: Control characters but tab and newline; marks that turn the direction of the text around them; what has no width
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_BREAKS = re.compile("[\u2028\u2029]")
_SURROGATES = re.compile("[\ud800-\udfff]")  # half a character: no file takes it


def plain(text: str) -> str:
    """`text` without terminal sequences and control characters; tabs and line breaks stay."""
    if text.isascii() and text.isprintable():
        return text
    text = _HIDDEN.sub("", _SEQUENCES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", _BREAKS.sub("\n", text))


def line(text: str, longest: int) -> str:
    """`text` in one line of at most `longest` characters."""
    text = " ".join(plain(text[: 20 * longest]).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def ends(text: str, longest: int) -> str:
    """`text` in one line of at most `longest` characters, beginning and end of it: of long paths the end differs."""
    text = line(text, 100 * longest)
    return text if len(text) <= longest else f"{text[: longest // 3]}…{text[longest // 3 + 1 - longest :]}"


def plain_deep(value: Any) -> Any:
    """`value` with every text in its lists and dictionaries made plain."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain_deep(key): plain_deep(item) for key, item in value.items()}
    return [plain_deep(item) for item in value] if isinstance(value, list) else value
