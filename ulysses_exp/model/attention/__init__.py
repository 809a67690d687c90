"""Ulysses sequence parallelism on Hugging Face models: registration, exchange, documents."""

from ulysses_exp.model.attention.exchange import all_to_all_bytes
from ulysses_exp.model.attention.handle import Ulysses
from ulysses_exp.model.attention.registration import ulysses

__all__ = ["Ulysses", "all_to_all_bytes", "ulysses"]
