"""What a user is told of a configuration that cannot run."""

from __future__ import annotations

import difflib


class ConfigError(Exception):
    """A configuration that cannot run: which key, what is wrong with it and what to set instead."""

    def __init__(self, key: str, problem: str, instead: str):
        super().__init__(key, problem, instead)  # the arguments again, so that it can be pickled
        self.key = key

    def __str__(self) -> str:
        key, problem, instead = self.args
        return f"{key}: {problem}; {instead}"


def nearest(word: str, choices: list[str]) -> str:
    """The choice that `word` was probably meant to be, or all of them."""
    match = difflib.get_close_matches(word, choices, 1, 0.5)
    if not match and "." in word:  # the right name in the wrong group, or the group misspelled
        match = [c for c in choices if c.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    if match:
        return f"did you mean {match[0]}?"
    return f"choose from {', '.join(choices)}" if len(choices) <= 16 else "python run.py --help lists the keys"
