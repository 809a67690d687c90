"""Declarative experiments with DeepSpeed Ulysses sequence parallelism on Hugging Face models.

As a library: `from ulysses_exp import ulysses`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_exp.model.attention import ulysses

__version__ = "0.2.0"
__all__ = ["ulysses"]


def __getattr__(name: str) -> Any:
    if name == "ulysses":  # imported at first use: torch and DeepSpeed come with it
        from ulysses_exp.model.attention import ulysses

        return ulysses
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
