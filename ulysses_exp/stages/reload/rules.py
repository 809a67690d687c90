"""What stage `reload` wants before a rank starts."""

from __future__ import annotations

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.layout_rules import check_after_train, check_layout
from ulysses_exp.config.schema import Config
from ulysses_exp.layout import Layout


def check(config: Config) -> None:
    """Raises ConfigError where there is no checkpoint, or a layout that it cannot be opened in."""
    for name in config.reload.layouts or ():
        try:
            target = Layout.parse(name)
        except ValueError as error:
            raise ConfigError("reload.layouts", str(error), "set e.g. reload.layouts=[sp1-dp1-z0,sp2-dp1-z3]") from None
        if "reload" in config.stages:
            check_layout(config, target, "reload.layouts")
    check_after_train(config, "reload")
