"""docs/reliability.md names tests that are there."""

import re

from checkout import ROOT


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page)
    assert len(named) > 60
    for file, function in named:
        text = (ROOT / file).read_text()
        assert f"def {function}(" in text or not function, f"{file}::{function}"
