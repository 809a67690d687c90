"""What a plan says of a rank's memory, beside what torch's allocator had handed out and had reserved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_steps import ranks
from gpu_steps.lengths import measured, shape
from gpu_steps.step import Row, Setting

LAYERS = 4
SAVERS = {"checkpointing": [8192, 32768], "alst": [8192, 32768, 131072]}


def parts(setting: Setting) -> list[str]:
    return setting.pick(list(SAVERS), ["checkpointing"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: a choice of `memory`."""
    lengths = setting.pick(SAVERS[part], [256, 512])
    config = ranks.configured(setting, *shape(setting, LAYERS, f"memory={part}", f"train.seq_len={lengths[-1]}"))
    plans = {tokens: _planned(setting, part, tokens) for tokens in lengths}
    for row in ranks.rows(setting, part, config, measured, lengths, 600.0):
        plan = plans[row["tokens"]]
        planned = plan["peak_memory_bytes_per_rank"]["total"]
        found = row.get("allocated_bytes")
        yield {
            "memory": part,
            "tokens": row["tokens"],
            "planned_bytes": planned,
            "allocated_bytes": found,
            "plan over allocated": planned / found - 1 if found else None,
            "reserved_bytes": row.get("reserved_bytes"),
            "outside_torch_bytes": row.get("outside_torch_bytes"),
            "planned_step_s": (plan["step_time_s"] or {}).get("total"),
            "step_s": row.get("step_s"),
            "trouble": None if row["became"] == "ok" else row["became"],
        }


def _planned(setting: Setting, memory: str, tokens: int) -> dict[str, Any]:
    from ulysses_exp.stages.plan.parent import plan

    hardware = setting.pick("h100", "cpu")  # memory does not ask which GPU
    more = [f"memory={memory}", f"train.seq_len={tokens}", f"plan.hardware={hardware}", "plan.search=false"]
    return plan(ranks.configured(setting, *shape(setting, LAYERS, *more)))
