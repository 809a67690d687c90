"""What stage `parity` wants before a rank starts."""

from __future__ import annotations

import re

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.schema import Config


def check(config: Config) -> None:
    """Raises ConfigError where the reference is not one process."""
    if not re.fullmatch("sp1-dp1-z[0-3]", config.parity.reference):
        problem = f"{config.parity.reference!r} is not a single process"
        raise ConfigError("parity.reference", problem, "set sp1-dp1-z0, or sp1-dp1-z3 with offload for large models")
