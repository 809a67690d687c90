"""Where claims are measured, and where a checkpoint of each of these layouts is opened."""

from __future__ import annotations

from ulysses_exp.config import Config, ConfigError, check_layout
from ulysses_exp.layout import Layout

KEY = "claims.layouts"

SAME, OTHER_SP, OTHER_WORLD, OTHER_STAGE = "itself", "other sp, same world", "other world", "other stage"


def asked(config: Config) -> list[Layout]:
    """`claims.layouts`, or sp 1, 2 and 4 at ZeRO 0 to 3. Raises ValueError for what is no layout."""
    if config.claims.layouts is not None:
        return [Layout.parse(name) for name in config.claims.layouts]
    return [Layout(sp, 1, zero) for sp in (1, 2, 4) for zero in range(4)]


def impossible(config: Config, layout: Layout) -> str | None:
    """Why this model or machine has no such layout; None where it has."""
    try:
        check_layout(config, layout, KEY)
    except ConfigError as error:
        return str(error.args[1])
    return None


def targets(config: Config, source: Layout) -> list[tuple[str, Layout]]:
    """(kind, layout) to open a checkpoint of `source` in, those that are possible here."""
    sp, dp, zero = source.sp, source.dp, source.zero
    wanted = [(SAME, source)]
    if sp > 1:
        wanted.append((OTHER_SP, Layout(sp // 2, dp * 2, zero)))
    elif dp > 1:
        wanted.append((OTHER_SP, Layout(2, dp // 2, zero)))
    wanted.append((OTHER_WORLD, Layout(sp // 2, dp, zero) if sp > 1 else Layout(2, dp, zero)))
    wanted += [(OTHER_STAGE, Layout(sp, dp, stage)) for stage in range(4) if stage != zero]
    return [(kind, target) for kind, target in wanted if impossible(config, target) is None]


def in_words(some: list[Layout], every: list[Layout]) -> str:
    """`some` of `every` layout, short, e.g. `sp 2, 4 with ZeRO 0 to 2`."""
    if set(some) == set(every):
        return "every layout"
    by_stages: dict[tuple[int, ...], list[Layout]] = {}
    for sp, dp in dict.fromkeys((layout.sp, layout.dp) for layout in some):
        stages = tuple(sorted(layout.zero for layout in some if (layout.sp, layout.dp) == (sp, dp)))
        by_stages.setdefault(stages, []).append(Layout(sp, dp))
    phrases = []
    groups = {(layout.sp, layout.dp) for layout in every}
    for stages, members in by_stages.items():
        where = ", ".join(str(m.sp) if m.dp == 1 else f"{m.sp} dp {m.dp}" for m in members)
        here = {(m.sp, m.dp) for m in members}
        known = tuple(sorted({layout.zero for layout in every if (layout.sp, layout.dp) in here}))
        of_stages = "" if stages == known else f"ZeRO {_run(stages)}"
        of_groups = "" if here == groups else f"sp {where}"
        phrases.append(" with ".join(part for part in (of_groups, of_stages) if part))
    return "; ".join(phrases)


def _run(stages: tuple[int, ...]) -> str:
    if len(stages) > 2 and stages == tuple(range(stages[0], stages[-1] + 1)):
        return f"{stages[0]} to {stages[-1]}"
    return ", ".join(map(str, stages))
