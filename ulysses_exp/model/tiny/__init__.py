"""Tiny models of any type that transformers has, to try in a second what holds for the type."""

from ulysses_exp.model.tiny.building import built
from ulysses_exp.model.tiny.shrinking import shrunk, tiny

__all__ = ["built", "shrunk", "tiny"]
