"""The collectives of a job, made by ranks that are started as a job's are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ulysses_exp.config import Config, resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.doctor.finding import Asked, Finding, existing, ok, wrong
from ulysses_exp.launch import RankFailure, Task, open_ranks
from ulysses_exp.report.units import of_bytes, of_seconds

_TIMEOUT_S = 60  # a collective of the doctor's that takes longer fails


def check(asked: Asked) -> Iterator[Finding]:
    """Starts `asked.ranks` ranks, which build an engine and make each collective at a few sizes."""
    # in the folder of the runs, which the ranks see wherever they are
    with tempfile.TemporaryDirectory(dir=existing(asked.outputs), prefix=".ulysses-exp-doctor-") as place:
        task = Task("doctor", _job(asked), ("collectives",), Path(place))
        launcher = open_ranks(task.config)
        try:
            launcher.run(task)
        except RankFailure as error:
            mend = "the same ranks as a job: python run.py 'stages=[train]'; its run.log has the whole trace"
            yield Finding("ranks", "wrong", str(error), mend, {"trace": error.trace})
            return
        finally:
            launcher.close()
        measured = json.loads((task.results / "collectives.json").read_text())
    how = f"rates are medians of {measured['calls']} calls after {measured['warm_up']} to warm up"
    yield ok("ranks", f"{asked.ranks} built an engine, on {measured['device']} over {measured['backend']}; {how}")
    for one in measured["collectives"]:
        yield _told(one, asked.ranks)
    seconds = measured["barrier_seconds"]
    yield ok("barrier", of_seconds(seconds), seconds=seconds)


def _job(asked: Asked) -> Config:
    """The smallest job, at as many ranks as asked for, started as asked for."""
    settings = ["data=synthetic", "stages=[train]", "tracker.mode=disabled", "train.seq_len=8", "sp.size=1"]
    ranks = [f"dp.size={asked.ranks}", f"train.global_batch_size={asked.ranks}"]
    cfg, _ = composed([*settings, *ranks, f"device={asked.config.device}"])
    timeout = min(_TIMEOUT_S, asked.config.launch.timeout_s)
    return replace(resolve(cfg), launch=replace(asked.config.launch, timeout_s=timeout))


def _told(one: dict[str, Any], ranks: int) -> Finding:
    if one.get("error"):
        return wrong(one["name"], one["error"], "another torch, or device=cpu")
    if not one["right"]:
        return wrong(one["name"], f"wrong numbers on {ranks} ranks",
                     "check cables and drivers; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 tell where")  # fmt: skip
    rates = ", ".join(f"{of_bytes(s['bytes_per_second'])}/s at {of_bytes(s['bytes'])}" for s in one["sizes"])
    return Finding(one["name"], "ok", f"right; {rates}", figures=one)
