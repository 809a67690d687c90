"""Numbers as people read them: a unit on every one, three significant digits."""

from __future__ import annotations

import math


def of_bytes(count: float | None) -> str:
    """Binary units, e.g. `1.50 GiB`."""
    if count is None or not math.isfinite(count):
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{_three(count)} {unit}"
        count /= 1024
    return f"{_three(count)} TiB"


def of_seconds(time: float | None) -> str:
    """`12.3 ms`, `1.23 s`, `4:05 min`, `1:02:03 h`."""
    if time is None or not math.isfinite(time):
        return "-"
    if time < 0.9995:
        return f"{_three(time * 1000)} ms"
    if time < 99.5:
        return f"{_three(time)} s"
    minutes, seconds = divmod(round(time), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} h"


def of_count(count: float | None) -> str:
    """Decimal units from a hundred thousand on: `12,345`, `831 k`, `8.03 B`."""
    if count is None or not math.isfinite(count):
        return "-"
    if abs(count) < 1e5:
        return f"{count:,.0f}" if abs(count) >= 100 or count == int(count) else _three(count)
    for unit in ("k", "M", "B", "T"):
        count /= 1000
        if abs(count) < 999.5:
            return f"{_three(count)} {unit}"
    return f"{_three(count / 1000)} P"


def of_difference(value: float | None) -> str:
    """`0` where it is exactly zero, else two digits, e.g. `1.2e-07`."""
    if value is None or not math.isfinite(value):
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def of_loss(value: float | None) -> str:
    """Four decimals."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _three(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
