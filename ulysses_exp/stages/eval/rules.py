"""What stage `eval` wants before a rank starts."""

from __future__ import annotations

from ulysses_exp.config.layout_rules import check_after_train
from ulysses_exp.config.schema import Config


def check(config: Config) -> None:
    """Raises ConfigError where there are no weights to evaluate; those of a named model will do."""
    check_after_train(config, "eval", needs_source=config.model.name_or_path is None)
