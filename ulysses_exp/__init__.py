"""Declarative experiments with DeepSpeed Ulysses sequence parallelism on Hugging Face models."""

__version__ = "0.1.0"
