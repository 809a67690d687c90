"""What reload cells start from and are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ulysses_exp.config import lineage
from ulysses_exp.config.received import sources
from ulysses_exp.config.received.manifest import CheckpointError, Manifest
from ulysses_exp.config.received.reading import Refused
from ulysses_exp.experiment.job import Job, StageFailure, checkpoint_of
from ulysses_exp.launch import Task
from ulysses_exp.layout import Layout


@dataclass(frozen=True)
class Source:
    """A checkpoint to reload: its folder, its layout, and the losses of the run that went on from it."""

    checkpoint: Path
    layout: Layout
    continuation: list[float] | None


def comparison_source(job: Job, note: Callable[[str], None]) -> Source:
    """The checkpoint to reload. Has the ranks go on from it where the losses to compare with are not known.

    Raises:
        StageFailure: there is no checkpoint that can be opened.
        RankFailure: going on failed.
    """
    train = job.results["stages"].get("train") or {}
    losses, same = None, True
    if train.get("checkpoint"):
        folder, checkpoint = job.folder, job.folder / train["checkpoint"]
        saved, losses = job.config.layout, train.get("continuation_loss")
    else:
        folder = sources.run_folders(job.config.checkpoint.source or "")[0]
        checkpoint = checkpoint_of(str(folder))
        try:
            manifest = Manifest.read(checkpoint)
        except CheckpointError as error:
            raise StageFailure(str(error)) from error
        saved = Layout.parse(manifest.layout)
        # losses of another configuration, e.g. of sequences of another length, are no losses to compare with
        same = lineage.changed(manifest.state, job.config) == {}
        try:
            losses = sources.continuation_losses(folder, job.config.reload.steps)
        except Refused as error:
            note(f"{error}; its losses are computed again")
    if (losses is None or len(losses) < job.config.reload.steps or not same) and job.config.reload.steps:
        layout = sources.comparison_layout(job.config, saved)
        note(f"continuing {folder.name} at {layout} for comparison")
        task = Task("continuation", job.config.at(layout), ("continuation",), job.folder,
                    {"checkpoint": str(checkpoint), "data_chosen": True})  # fmt: skip
        losses = job.do(task, "continuation")["loss"]
        if train.get("checkpoint"):
            train["continuation_loss"] = losses
    return Source(checkpoint, saved, losses)
