"""Which types of models are known to be right in slices: what `benchmarks/models.py` found, for one transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ulysses_exp.config.model_rules import ropes

FILE = Path(__file__).with_name("tried.json")


#: Rotary embeddings whose frequencies follow the longest position that they are given, in whatever type of model
_BY_LENGTH = {"dynamic", "longrope"}


def right(model_type: str, settings: Mapping[str, Any]) -> bool:
    """Whether such models were tried with the installed transformers, and gave the right numbers.

    Args:
        settings: of the part that reads text.
    """
    kinds = {rope.get("rope_type", rope.get("type")) for rope in ropes(settings)}
    return model_type in _found() and not kinds & _BY_LENGTH


@cache
def _found() -> frozenset[str]:
    found = json.loads(FILE.read_text())
    return frozenset(found["right"]) if found["transformers"] == version("transformers") else frozenset()
