"""Three significant digits and a unit."""

import math

import pytest

from ulysses_exp.report.units import of_bytes, of_count, of_difference, of_seconds


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (of_bytes(0), "0 B"), (of_bytes(999), "999 B"), (of_bytes(1536), "1.50 KiB"), (of_bytes(2**30), "1.00 GiB"),
        (of_bytes(80 * 2**30), "80.0 GiB"), (of_bytes(3 * 2**40), "3.00 TiB"), (of_bytes(None), "-"),
        (of_seconds(0.0123), "12.3 ms"), (of_seconds(1.234), "1.23 s"), (of_seconds(59.96), "60.0 s"),
        (of_seconds(245), "4:05 min"), (of_seconds(6455), "1:47:35 h"), (of_seconds(math.nan), "-"),
        (of_count(12345), "12,345"), (of_count(24.8), "24.8"), (of_count(0), "0"), (of_count(852_608), "853 k"),
        (of_count(8.03e9), "8.03 B"), (of_count(math.inf), "-"),
        (of_difference(0.0), "0"), (of_difference(1.23e-7), "1.2e-07"), (of_difference(None), "-"),
    ],
)  # fmt: skip
def test_written(written, expected):
    assert written == expected
