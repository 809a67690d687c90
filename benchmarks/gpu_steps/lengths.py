"""Optimizer steps of one session at several lengths: time, tokens, MFU, and the allocator's marks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from gpu_steps.step import Row, Setting

if TYPE_CHECKING:
    from ulysses_exp.rank.session import Session

STEPS = 3  # the first of them is left out of the median


def shape(setting: Setting, layers: int, *more: str) -> list[str]:
    """Overrides: so many layers of Llama 8B in bf16 with AdamW, one sequence a step. Of its 32 layers' optimizer
    states a rank of eight holds as much as four layers have."""
    real = [
        "model=llama3_8b", f"model.architecture.num_hidden_layers={layers}",
        "model.architecture.max_position_embeddings=8388608", "train.precision=bf16",
    ]  # fmt: skip
    one = ["data=synthetic", "train.global_batch_size=1", "sp.size=1", "zero.stage=3"]
    return [*setting.pick(real, ["model=tiny_llama"]), *one, *more]


def measured(session: Session, lengths: list[int], longest_step_s: float) -> Iterator[Row]:
    """A row a length, in order, until memory runs out or a step would take longer than that."""
    import torch

    from ulysses_exp.rank.data import Batches
    from ulysses_exp.rank.metrics import flops, memory
    from ulysses_exp.rank.step import optimizer_step

    config, device, number = session.config, session.device, 0
    cuda = device.type == "cuda"
    peak = flops.peak_flops(session.describe()["device"], config.train.precision)
    session.engine.train()
    for tokens in lengths:
        config = replace(config, train=replace(config.train, seq_len=tokens))
        session.task = replace(session.task, config=config)
        session.batches = Batches(config, session.corpus, session.rank)
        if cuda:
            torch.cuda.empty_cache()
        memory.reset_peak(device)
        seconds: list[float] = []
        try:
            for _ in range(STEPS):
                began = time.perf_counter()
                optimizer_step(session, number)
                seconds.append(time.perf_counter() - began)
                number += 1
        except torch.OutOfMemoryError as error:
            yield {"tokens": tokens, "became": f"out of memory ({str(error).split('.')[1].strip()})"}
            return
        median = statistics.median(seconds[1:])
        work = flops.step_flops(
            session.engine.module.config, seq_len=tokens, sequences=1, memory=config.memory, sp=config.sp.size
        )
        share = median * session.layout.world * peak if peak else None
        row: Row = {
            "tokens": tokens,
            "became": "ok",
            "step_s": median,
            "first_step_s": seconds[0],
            "tokens/s": tokens / median,
            "MFU": work.model / share if share else None,
            "HFU": work.hardware / share if share else None,
            "allocated_bytes": memory.peak(device),
        }
        if cuda:
            free, total = torch.cuda.mem_get_info(device)
            row["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            row["outside_torch_bytes"] = total - free - torch.cuda.memory_reserved(device)
        yield row
        if median * 4 > longest_step_s and tokens != lengths[-1]:
            yield {"tokens": tokens * 2, "became": f"not tried: {median:.0f} s a step at half of it"}
            return
