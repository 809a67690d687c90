"""What stage `claims` wants before a rank starts."""

from __future__ import annotations

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.schema import Config
from ulysses_exp.stages.claims.layouts import KEY, asked, impossible


def check(config: Config) -> None:
    """Raises ConfigError where no layout is left, or one is no layout. One that cannot be had here is a cell."""
    try:
        layouts = asked(config)
    except ValueError as error:
        raise ConfigError(KEY, str(error), "set e.g. claims.layouts=[sp1-dp1-z0,sp2-dp1-z3]") from None
    if len(set(layouts)) != len(layouts) or not layouts:
        problem = "names a layout twice" if layouts else "is empty"
        raise ConfigError(KEY, problem, "set each layout once, or null for sp 1, 2, 4 at ZeRO 0 to 3")
    if "claims" in config.stages and (reasons := [impossible(config, layout) for layout in layouts]) and all(reasons):
        raise ConfigError(KEY, f"{layouts[0].name}: {reasons[0]}", "set layouts that this model and machine have")
