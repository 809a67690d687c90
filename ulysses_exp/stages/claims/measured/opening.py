"""C7: checkpoints of other layouts, opened in this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ulysses_exp.config import Config
from ulysses_exp.launch import heartbeat
from ulysses_exp.rank.checkpoints import fingerprint
from ulysses_exp.stages.claims.measured.checkpoints import RECORD, said


def count(side: Any, config: Config, folders: list[Path]) -> list[dict[str, Any]]:
    """Opens each in an engine of its own with other weights. Collective over the world.

    Returns:
        For each of `folders` whether `weights` and optimizer `states` are those that were saved, bit for bit; or the
        `error`, of the first rank that has one.
    """
    found = []
    for folder in folders:
        heartbeat.beat()
        with side.subject(config, seed=config.seed + 1) as subject:
            error = None
            try:
                subject.load(folder)
            except Exception as failure:
                error = said(failure)
            errors: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(errors, error)
            if any(errors):
                found.append({"error": next(e for e in errors if e)})
                continue
            now, saved = fingerprint(subject.engine).as_dict(), json.loads((folder / RECORD).read_text())
            found.append(
                {
                    "weights": now["weights"] == saved["weights"],
                    "states": now["optimizer"] == saved["optimizer"] and now["numbers"] == saved["numbers"],
                }
            )
    return found
