"""The command `ulysses-exp`, and run.py."""

from ulysses_exp.cli.command import main

__all__ = ["main"]
