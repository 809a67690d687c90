"""Stage `claims`, the part of a rank: figures for each claim, on one side at one layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from ulysses_exp.config import Config
from ulysses_exp.config.schema import OptimConfig
from ulysses_exp.launch import heartbeat
from ulysses_exp.launch.task import Task
from ulysses_exp.model import build as models
from ulysses_exp.stages.claims.measured import checkpoints, communication, gradients, opening, weights
from ulysses_exp.stages.claims.measured.reference import reference
from ulysses_exp.stages.claims.measured.this_project import ThisProject
from ulysses_exp.stages.claims.measured.upstream_alone import UpstreamAlone

#: SGD moves weights by the gradient itself; AdamW has states to save
_SGD = OptimConfig(name="sgd", lr=1.0, grad_clip=0.0)
_ADAMW = OptimConfig(name="adamw", lr=1e-3, grad_clip=0.0)


def model(task: Task, rank: int) -> dict[str, Any]:
    """What results.json says of the model, from its shape alone."""
    architecture = models.pretrained_config(task.config)
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            architecture, trust_remote_code=task.config.model.trust_remote_code
        )
    return models.describe(task.config, architecture, sum(p.numel() for p in built.parameters()))


def measure(task: Task, rank: int) -> dict[str, Any]:
    """Of `options["parts"]` on `options["side"]`, by claim, each a list of what the ranks have counted."""
    parts = task.options["parts"]
    side = _side(task, rank)
    found: dict[str, Any] = {}
    known = None
    if {"communication", "gradients"} & set(parts):
        known = reference(task.config, rank, gradient="gradients" in parts)
        with side.subject(_with(task.config, _SGD)) as subject:
            if "communication" in parts:
                found |= communication.count(subject, known)
            if "gradients" in parts:
                heartbeat.beat("gradients")
                found |= gradients.count(subject, known)
    if {"weights", "checkpoints"} & set(parts):
        with side.subject(_with(task.config, _ADAMW)) as subject:
            heartbeat.beat("weights")
            if "weights" in parts:
                found |= weights.count(subject)
            else:
                subject.step(0)
            if "checkpoints" in parts:
                heartbeat.beat("checkpoints")
                found |= checkpoints.count(subject, Path(task.options["folder"]))
    return {claim: _of_all_ranks(counted) for claim, counted in found.items()}


def open_checkpoints(task: Task, rank: int) -> dict[str, Any]:
    """`options["folders"]`, checkpoints of `options["side"]` at other layouts, in this one."""
    folders = [Path(folder) for folder in task.options["folders"]]
    return {"opened": opening.count(_side(task, rank), _with(task.config, _ADAMW), folders)}


def _side(task: Task, rank: int) -> Any:
    return UpstreamAlone(rank) if task.options["side"] == UpstreamAlone.side else ThisProject(task, rank)


def _with(config: Config, optim: OptimConfig) -> Config:
    return replace(config, optim=optim)


def _of_all_ranks(counted: dict[str, Any]) -> list[dict[str, Any]]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, counted)
    return every
