"""This project: the session that every stage works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.config import Config
from ulysses_exp.launch.task import Task
from ulysses_exp.model.attention import core
from ulysses_exp.model.attention.exchange import FusedUlyssesAttention
from ulysses_exp.rank import checkpoints
from ulysses_exp.rank.session import open_session
from ulysses_exp.rank.step import optimizer_step
from ulysses_exp.stages.claims.measured.attention_calls import AttentionCalls
from ulysses_exp.stages.claims.measured.subject import Subject
from ulysses_exp.stages.claims.measured.upstream_alone import constructed


class ThisProject:
    """Makes subjects, one after the other."""

    side = "here"

    def __init__(self, task: Task, rank: int):
        self.task, self.rank = task, rank

    @contextmanager
    def subject(self, config: Config, seed: int | None = None) -> Iterator[Subject]:
        """A session at `config.layout`; `seed` draws other weights. Collective over the world."""
        calls = AttentionCalls()
        options = {} if seed is None else {"model_seed": seed}
        task = replace(self.task, config=config, options=options)
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]
        around = core.around

        def noted(name: str, function: Any) -> Any:
            return calls.arriving(around(name, function))

        with (
            calls.behind("sdpa"),
            patch("ulysses_exp.model.attention.core.around", noted),
            open_session(task, self.rank) as session,
            calls.before(_name(session.engine.module)),
        ):
            mpu = session.attention.mpu
            group = mpu.get_sequence_parallel_group() if mpu is not None else dist.new_subgroups(1)[0]
            kind = FusedUlyssesAttention if config.sp.exchange == "fused" else UlyssesSPAttentionHF
            whole = calls.arriving(original)
            engine = session.engine

            def step(number: int) -> None:
                engine.train()
                optimizer_step(session, number)

            def save(folder: Path) -> None:
                checkpoints.save(engine, folder / "step1", layout=session.layout, step=1, state={})

            def load(folder: Path) -> None:
                checkpoints.load(engine, folder / "step1", layout=session.layout)

            def exports(checkpoint: Path, room: Path) -> dict[str, Path | str]:
                return {"the checkpoint's huggingface/": checkpoint / "step1" / "huggingface"}

            yield Subject(
                self.side, config, self.rank, engine, calls, original,
                constructed(kind, whole, config, engine.module.config, group), step, save, load, exports,
            )  # fmt: skip


def _name(model: Any) -> str:
    """Under which the model's attention is in transformers' table; one without is noted where sdpa's is."""
    name = str(model.config.get_text_config()._attn_implementation)
    return name if name in ALL_ATTENTION_FUNCTIONS else "sdpa"
