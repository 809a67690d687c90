"""Stage `claims`, the part of the parent: a task a side and layout, and what their figures come to."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ulysses_exp.config import Config
from ulysses_exp.experiment.job import Job
from ulysses_exp.launch import RankFailure, Task
from ulysses_exp.layout import Layout
from ulysses_exp.stages.claims import layouts
from ulysses_exp.stages.claims.cell import Cell
from ulysses_exp.stages.claims.judgement import judged
from ulysses_exp.stages.claims.room import Room
from ulysses_exp.stages.claims.sentences import CLAIMS, SIDES
from ulysses_exp.stages.claims.summary import summary

log = logging.getLogger("ulysses_exp")

PARTS = tuple(dict.fromkeys(claim.part for claim in CLAIMS))
_WAIT_S = 60  # for ranks that wait for one another: upstream's refusals can leave some of them waiting

Counted = dict[tuple[str, Layout, str], Any]  # by side, layout and claim: what `judgement.judged` takes


def run(job: Job, note: Callable[[str], None]) -> None:
    """Both sides at every layout, then every checkpoint at its other layouts; a cell for each claim."""
    config = replace(job.config, launch=replace(job.config.launch, timeout_s=min(_WAIT_S, job.config.launch.timeout_s)))
    job.results["model"] = job.do(
        Task("claims-model", config.at(Layout()), ("claims_model",), job.folder), "claims_model"
    )
    room = Room(job, config, job.results["model"]["parameters"])
    counted: Counted = {}
    wanted = layouts.asked(config)
    for number, layout in enumerate(wanted, 1):
        for side in SIDES:
            note(f"claims {layout}, {side} ({number}/{len(wanted)})")
            for claim, figures in _measured(job, config, side, layout, room).items():
                counted[side, layout, claim] = figures
    for side in SIDES:
        note(f"claims: opening checkpoints, {side}")
        _open(job, config, side, wanted, counted)
    shutil.rmtree(job.folder / "claims", ignore_errors=True)
    cells = [
        judged(claim.key, side, layout.name, counted[side, layout, claim.key], config.train.precision)
        for claim in CLAIMS
        for side in SIDES
        for layout in wanted
        if (side, layout, claim.key) in counted
    ]
    job.take("claims", {"status": "ok", **_by_claim(cells, wanted)})


def _measured(job: Job, config: Config, side: str, layout: Layout, room: Room) -> dict[str, Any]:
    """What ranks have counted, by claim; where they fail, each part again by itself, so that only it is lost."""
    if (reason := layouts.impossible(config, layout) or room.memory(layout)) is not None:
        return {claim.key: {"not_tried": reason} for claim in CLAIMS}
    parts, found = PARTS, {}
    if (reason := room.disk(layout)) is not None:
        parts = tuple(part for part in PARTS if part != "checkpoints")
        found = {claim.key: {"not_tried": reason} for claim in CLAIMS if claim.part not in parts}
    try:
        return found | _task(job, config, side, layout, parts)
    except RankFailure as error:
        log.warning("claims %s at %s: %s\n%s", side, layout, error, error.trace)
    for part in parts:
        try:
            found |= _task(job, config, side, layout, (part,))
        except RankFailure as error:
            log.warning("claims %s at %s, %s: %s\n%s", side, layout, part, error, error.trace)
            entry = {"not_tried": f"out of memory: {error}"} if error.out_of_memory else {"error": str(error)}
            found |= {claim.key: entry for claim in CLAIMS if claim.part == part}
    return found


def _task(job: Job, config: Config, side: str, layout: Layout, parts: tuple[str, ...]) -> dict[str, Any]:
    options = {"side": side, "parts": list(parts), "folder": str(_folder(job, side, layout))}
    name = "-".join(("claims", side, layout.name, *(parts if len(parts) == 1 else ())))
    return job.do(Task(name, config.at(layout), ("claims",), job.folder, options), "claims")


def _open(job: Job, config: Config, side: str, wanted: list[Layout], counted: Counted) -> None:
    """Every checkpoint at the layouts that it is to be opened in, a task for each of these."""
    tries: dict[Layout, list[tuple[str, Layout]]] = {}  # by target: (kind, source)
    for source in wanted:
        saved = counted[side, source, "C6"]
        if isinstance(saved, dict):  # there is none, and why
            counted[side, source, "C7"] = saved
            continue
        counted[side, source, "C7"] = [{"opened": []}]
        for kind, target in layouts.targets(config, source):
            tries.setdefault(target, []).append((kind, source))
    for target, sources in sorted(tries.items()):
        for (kind, source), found in zip(sources, _opened(job, config, side, target, sources), strict=True):
            counted[side, source, "C7"][0]["opened"].append({"kind": kind, "target": target.name, **found})


def _opened(
    job: Job, config: Config, side: str, target: Layout, sources: list[tuple[str, Layout]]
) -> list[dict[str, Any]]:
    """What opening each of `sources` in `target` came to; where ranks fail, each again in a task of its own."""
    folders = [str(_folder(job, side, source)) for _, source in sources]
    name = f"claims-open-{side}-{target.name}" + (f"-{sources[0][1].name}" if len(sources) == 1 else "")
    task = Task(name, config.at(target), ("claims_open",), job.folder, {"side": side, "folders": folders})
    try:
        opened: list[dict[str, Any]] = job.do(task, "claims_open")["opened"]
        return opened
    except RankFailure as error:
        log.warning("claims %s, opening in %s: %s\n%s", side, target, error, error.trace)
        if len(sources) == 1:
            return [{"error": str(error)}]
    return [found for one in sources for found in _opened(job, config, side, target, [one])]


def _folder(job: Job, side: str, layout: Layout) -> Path:
    """Where the checkpoint of a side and layout lies."""
    return job.folder / "claims" / f"{side}-{layout.name}"


def _by_claim(cells: list[Cell], wanted: list[Layout]) -> dict[str, Any]:
    """The entry of results.json: by claim, its sentence, and of each side a summary and its cells."""
    found: dict[str, Any] = {}
    for claim in CLAIMS:
        found[claim.key] = {"claim": claim.sentence}
        for side in SIDES:
            mine = [cell for cell in cells if (cell.claim, cell.side) == (claim.key, side)]
            found[claim.key][side] = summary(mine, wanted) | {"cells": {cell.layout: cell.as_dict() for cell in mine}}
    return found
