"""What a stage works with on one rank: the engine, its attention, the data, the counters."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ulysses_exp.config import Config, ConfigError, device_of, lineage
from ulysses_exp.launch import heartbeat, strict_json
from ulysses_exp.launch.output_trouble import told
from ulysses_exp.launch.task import Task
from ulysses_exp.layout import Layout
from ulysses_exp.model import build as models
from ulysses_exp.model import memory as memory_savers
from ulysses_exp.model.attention import Ulysses, ulysses
from ulysses_exp.model.compiled import compile_layers
from ulysses_exp.model.outside_attention import why_not_in_slices
from ulysses_exp.rank import checkpoints
from ulysses_exp.rank.data import Batches, Corpus, load_corpus
from ulysses_exp.rank.engine import build_engine
from ulysses_exp.rank.metrics.communication import AllToAllCounter

_BUILT = "the model is built"  # in the store where the ranks meet


@dataclass
class Session:
    """One rank's part of a job. `step` counts optimizer steps that the engine has made."""

    task: Task
    rank: int
    device: torch.device
    engine: deepspeed.DeepSpeedEngine
    attention: Ulysses
    corpus: Corpus
    batches: Batches
    all_to_alls: AllToAllCounter
    model: dict[str, Any]  # the `model` entry of results.json
    step: int = 0
    changed: dict[str, list[Any]] | None = None  # settings that differ from the checkpoint's: [then, now]

    @property
    def config(self) -> Config:
        return self.task.config

    @property
    def layout(self) -> Layout:
        return self.task.layout

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """From host memory to this rank's device, without waiting for the copy."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """A line of metrics.jsonl, written now. Rank 0 only; the parent shows it and hands it to the tracker."""
        if self.rank == 0:
            path = self.task.folder / "metrics.jsonl"
            with told(path), path.open("a") as file:
                file.write(strict_json.dumps({"step": step, **metrics}) + "\n")

    def sync_log(self) -> None:
        """Brings metrics.jsonl to disk. Rank 0 only."""
        if self.rank == 0:
            path = self.task.folder / "metrics.jsonl"
            with told(path), path.open("a") as file:
                os.fsync(file.fileno())

    def resume(self, training: bool = False) -> None:
        """Loads the checkpoint that the task starts from, unless it names none or something is loaded or trained.

        Raises:
            ConfigError: `training` would go on with other data than the checkpoint's, unasked.
        """
        source = self.task.options.get("checkpoint")
        if source is None or self.step:
            return
        trust = self.task.options.get("trust_pickle", self.config.checkpoint.trust_pickle)
        loaded = checkpoints.load(self.engine, Path(source), layout=self.layout, trust_pickle=trust)
        self.step = loaded.step
        self.changed = lineage.changed(loaded.state, self.config)
        if training:
            chosen = bool(self.task.options.get("data_chosen"))
            lineage.check_data(loaded.state, self.config, self.corpus.sha256, chosen)

    def describe(self) -> dict[str, Any]:
        """What results.json says of model and machine."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "model": self.model,
            "device": device,
            "data": {"name": self.corpus.name, "sha256": self.corpus.sha256},
            "threads_per_rank": torch.get_num_threads(),
        }


@contextlib.contextmanager
def open_session(task: Task, rank: int) -> Iterator[Session]:
    """Builds what `task` needs on this rank and takes it down again. Collective over the ranks of the task."""
    config = task.config
    device = torch.device("cuda", torch.cuda.current_device()) if device_of(config) == "cuda" else torch.device("cpu")
    with contextlib.ExitStack() as stack:
        all_to_alls = stack.enter_context(AllToAllCounter())
        with _on_all_cores() if rank == 0 else contextlib.nullcontext():
            model = models.build(config, task.options.get("model_seed"), rank)
        _wait_for_rank_0(rank)
        _refuse_outside_attention(config, model)
        description = models.describe(config, model.config, sum(p.numel() for p in model.parameters()))
        corpus = load_corpus(config, model.config.get_text_config().vocab_size)
        memory_savers.apply(model, config.memory)
        if config.train.compile:
            compile_layers(model, task.folder / "compiled")
        attention = stack.enter_context(
            ulysses(
                model,
                sp=config.sp.size,
                attention=config.sp.attention,
                exchange=config.sp.exchange,
                micro_batch_size=config.train.micro_batch_size,
                disable_in_eval=True,
            )
        )
        engine = build_engine(config, model, attention.mpu)
        stack.callback(engine.destroy)
        yield Session(
            task=task,
            rank=rank,
            device=device,
            engine=engine,
            attention=attention,
            corpus=corpus,
            batches=Batches(config, corpus, rank),
            all_to_alls=all_to_alls,
            model=description,
        )


def _refuse_outside_attention(config: Config, model: PreTrainedModel) -> None:
    """Raises ConfigError where slices of sequences would give other numbers, as a tiny copy of the model shows.

    Of models that the parent could read it has asked already; not of those with code of their own.
    """
    if config.sp.size > 1 and (why := why_not_in_slices(model)) is not None:
        raise ConfigError("sp.size", why, "set sp.size=1")


@contextlib.contextmanager
def _on_all_cores() -> Iterator[None]:
    """Weights are read, converted and checked on all cores that this process may use: the other ranks wait.

    Random ones are drawn one after another on any number of threads (torch's generator is locked for a whole tensor),
    so a seed gives the same weights, in the same time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait_for_rank_0(rank: int) -> None:
    """Returns when rank 0 has the model: reading or drawing a large one takes longer than ranks wait in a collective.

    Whoever waits gives signs of life, so a rank 0 that stands still is the one that is named.
    """
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set(_BUILT, "")
        return
    while not store.check([_BUILT]):
        heartbeat.beat()
        time.sleep(0.02)
