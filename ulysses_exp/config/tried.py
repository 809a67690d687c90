"""Which types of models are known to be right in slices: what `benchmarks/models.py` found, for one transformers."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).with_name("tried.json")


def right(model_type: str) -> bool:
    """Whether models of this type were tried with the installed transformers, and gave the right numbers."""
    return model_type in _found()


@cache
def _found() -> frozenset[str]:
    found = json.loads(FILE.read_text())
    return frozenset(found["right"]) if found["transformers"] == version("transformers") else frozenset()
