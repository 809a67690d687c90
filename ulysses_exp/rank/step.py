"""The optimizer step and the scale of its loss."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ulysses_exp.launch import heartbeat, stopping
from ulysses_exp.layout import Layout
from ulysses_exp.rank import nonfinite
from ulysses_exp.rank.data import MicroBatch
from ulysses_exp.rank.metrics import memory
from ulysses_exp.rank.session import Session


def gradient_scale(layout: Layout) -> int:
    """The factor on a rank's share of the loss with which DeepSpeed's reduction yields the mean loss's gradient.

    Each rank back-propagates its own targets' loss over the token count of the whole step, so the true gradient is the
    plain *sum* over ranks. DeepSpeed 0.19.8 sums and then divides: by world / sp = dp in stages 0 to 2 (engine.py
    `allreduce_bucket`, stage_1_and_2.py), by world in stage 3 (coalesced_collectives.py `reduce_scatter_coalesced`).
    """
    return layout.world if layout.zero == 3 else layout.dp


@dataclass
class Step:
    """What one optimizer step came to, the same on every rank. Times in seconds, sizes in bytes."""

    number: int  # counted from 1
    loss: float  # mean over all targets of the step
    grad_norm: float  # of the mean loss, before clipping; nan where it is not finite
    learning_rate: float
    tokens: int  # without padding, each once
    seconds: float
    input_seconds: float
    peak_memory: list[int]  # per rank, since the stage began
    all_to_all_calls: int  # of the busiest rank
    all_to_all_bytes: int
    asked_to_stop: bool  # by a signal that any rank has got
    allocator: dict[str, list[int]] = field(default_factory=dict)  # memory.allocator of each rank; empty on CPU
    skipped: bool = False  # train.on_nonfinite=skip has left its update out
    trouble: dict[str, Any] | None = None  # nonfinite.explain, of the first step that is not finite

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def forward(session: Session, batch: MicroBatch, **labels: Any) -> Any:
    """The model on this rank's slice. Tells the attention the whole sequences' positions and padding first."""
    heartbeat.beat()
    mask = batch.global_mask
    session.attention.begin(batch.global_position_ids, mask)
    local_mask = mask if mask is not None and session.layout.sp == 1 else None
    move = session.to_device
    return session.engine(
        input_ids=move(batch.input_ids),
        position_ids=move(batch.position_ids),
        attention_mask=None if local_mask is None else move(local_mask),
        use_cache=False,
        **labels,
    )


@dataclass
class _Pending:
    """An optimizer step whose figures are still on this rank's device."""

    number: int
    loss: torch.Tensor  # this rank's share
    grad_norm: torch.Tensor | float
    learning_rate: float
    tokens: torch.Tensor
    began: float  # time.perf_counter()
    input_seconds: float
    peak_memory: int
    all_to_all_calls: int
    all_to_all_bytes: int
    watched: nonfinite.Watched
    skipped: bool


def optimizer_step(session: Session, step: int) -> Step:
    """One optimizer step over `train.global_batch_size` sequences. Collective over all ranks."""
    return figures(session, [make_step(session, step)])[0]


def make_step(session: Session, step: int) -> _Pending:
    """As `optimizer_step`, without waiting for the device."""
    heartbeat.beat(step=step)
    engine, layout, device = session.engine, session.layout, session.device
    began = time.perf_counter()
    mark = session.all_to_alls.now
    batches = session.batches.step(step)
    input_seconds = time.perf_counter() - began

    # by way of `to_device`: made on the device, it would wait for the step before
    counts = session.to_device(
        torch.tensor([sum(batch.global_targets for batch in batches), sum(batch.global_tokens for batch in batches)])
    )
    if layout.dp > 1:  # the ranks of a group have counted the same sequences
        counts *= int(layout.sp_rank(session.rank) == 0)
        dist.all_reduce(counts)
    items = counts[0].clamp(min=1).float()  # transformers divides the summed loss of a micro batch by this
    share = torch.zeros((), dtype=torch.float64, device=device)
    learning_rate = engine.get_lr()[0]
    schedule = engine.lr_scheduler
    scheduled = schedule.last_epoch if schedule is not None else None
    losses: list[torch.Tensor] = []
    skipped = False
    for number, batch in enumerate(batches, 1):
        labels = session.to_device(batch.labels)
        # always through the engine: under ZeRO 3 a call of the module itself drops all but one micro batch
        loss = forward(session, batch, labels=labels, shift_labels=labels, num_items_in_batch=items).loss
        losses.append(loss.detach())
        share += losses[-1].double()
        # the product makes a new tensor, and has to: given the model's output itself, stage 0 divides the gradient by
        # the accumulation steps in spite of scale_wrt_gas=False (docs/findings.md)
        engine.backward(loss * gradient_scale(layout), scale_wrt_gas=False)
        if number == len(batches):
            own_norm = _unsharded_norm(session)
            watched = nonfinite.watch(engine, losses)
            if session.config.train.on_nonfinite == "skip" and not nonfinite.all_finite(watched):
                skipped = True
        with nonfinite.discard(engine) if skipped else contextlib.nullcontext():
            engine.step()
    if schedule is not None and schedule.last_epoch == scheduled:
        # DeepSpeed leaves out what is not finite, in some layouts. Such a step counts for the schedule all the same:
        # the learning rate depends on nothing but the number of the step
        schedule.step()
    calls, size = session.all_to_alls.since(mark)
    return _Pending(
        number=step + 1,
        loss=share,
        grad_norm=own_norm if own_norm is not None else engine.get_global_grad_norm(),
        learning_rate=learning_rate,
        tokens=counts[1],
        began=began,
        input_seconds=input_seconds,
        peak_memory=memory.peak(device),
        all_to_all_calls=calls,
        all_to_all_bytes=size,
        watched=watched,
        skipped=skipped,
    )


def figures(session: Session, steps: list[_Pending]) -> list[Step]:
    """What consecutive steps came to, with one collective for all of them.

    Only here the host waits for the device, so each step's time is an equal share of the time they took together.
    """
    world, device = session.layout.world, session.device
    held = memory.allocator(device)
    rows = torch.zeros(world, len(steps), 6 + len(held), dtype=torch.float64, device=device)
    asked = stopping.requests.signal is not None
    rows[session.rank, :, 2:] = torch.tensor(
        [[s.peak_memory, s.all_to_all_calls, s.all_to_all_bytes, asked, *held.values()] for s in steps],
        dtype=torch.float64,
        device=device,
    )
    rows[session.rank, :, 0] = torch.stack([s.loss for s in steps])
    rows[session.rank, :, 1] = torch.stack([torch.as_tensor(s.grad_norm, device=device).double() for s in steps])
    dist.all_reduce(rows)
    table = rows.cpu()
    tokens = [int(s.tokens) for s in steps]
    seconds = (time.perf_counter() - steps[0].began) / len(steps)
    found = [
        Step(
            number=s.number,
            loss=float(table[:, n, 0].sum()),
            grad_norm=_finite_norm(float(table[0, n, 1])),
            learning_rate=s.learning_rate,
            tokens=tokens[n],
            seconds=seconds,
            input_seconds=s.input_seconds,
            peak_memory=[int(x) for x in table[:, n, 2]],
            all_to_all_calls=int(table[:, n, 3].max()),
            all_to_all_bytes=int(table[:, n, 4].max()),
            asked_to_stop=bool(table[:, n, 5].any()),
            allocator={name: [int(x) for x in table[:, n, column]] for column, name in enumerate(held, 6)},
            skipped=s.skipped,
        )
        for n, s in enumerate(steps)
    ]
    for step, pending in zip(found, steps, strict=True):
        if not step.finite:
            step.trouble = nonfinite.explain(session, step.number, pending.watched)
            break
    return found


def _finite_norm(norm: float) -> float:
    """DeepSpeed says inf or, in bf16 at stages 1 and 2, -1 where a gradient norm is not finite."""
    return norm if 0 <= norm < math.inf else math.nan


def _unsharded_norm(session: Session) -> torch.Tensor | None:
    """L2 norm of the reduced gradients before clipping, where they are whole on every rank; None elsewhere.

    `engine.get_global_grad_norm()` at stage 0 is None in fp32, and in bf16 that of gradients cast to bf16.
    """
    if session.layout.zero:
        return None
    gradients = [p.grad for p in session.engine.module.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in gradients]))
