"""Stage `train`: optimizer steps, their metrics, and a checkpoint at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ulysses_exp.config import lineage
from ulysses_exp.config import measuring as throughput
from ulysses_exp.config.measuring import PROFILED_STEPS
from ulysses_exp.launch import heartbeat
from ulysses_exp.launch.stopping import Stopped
from ulysses_exp.rank import checkpoints, nonfinite
from ulysses_exp.rank.evaluation import fixed_logits
from ulysses_exp.rank.metrics import flops, memory
from ulysses_exp.rank.metrics.step_split import step_split
from ulysses_exp.rank.session import Session
from ulysses_exp.rank.step import Step, figures, make_step


def train(session: Session) -> dict[str, Any]:
    """Trains to optimizer step `train.steps`, from the checkpoint that the task starts from where there is one.

    Where a step is not finite the result is `failed` (`train.on_nonfinite`); it then has what came before it.

    Raises:
        Stopped: a rank has been asked to stop; all ranks have saved a checkpoint at the same step.
    """
    config = session.config
    session.resume(training=True)
    first = session.step
    session.engine.train()
    memory.reset_peak(session.device)
    work = flops.step_flops(
        session.engine.module.config,
        seq_len=config.train.seq_len,
        sequences=config.train.global_batch_size,
        memory=config.memory,
        sp=config.sp.size,
    )
    if first >= config.train.steps:
        return _nothing_to_do(session, work)
    peak = flops.peak_flops(session.describe()["device"], config.train.precision)
    steps: list[Step] = []
    pending = []  # steps of which the host knows nothing yet: asking for figures waits for the device
    saving: checkpoints.Saving | None = None  # the newest checkpoint, perhaps still on its way to disk
    first_finished = None
    stopped = False  # a step was not finite, and no more are wanted
    spoiled = None  # a weight or state that a step with finite loss and gradients has made nan or infinite
    profile = Profile(session)
    with profile:
        while session.step < config.train.steps:
            pending.append(make_step(session, session.step))
            session.step += 1
            profile.step()
            due = bool(config.checkpoint.every) and session.step % config.checkpoint.every == 0
            last = session.step == config.train.steps
            if len(pending) == config.train.log_every or due or last or session.step == first + 1:
                for step in figures(session, pending):
                    steps.append(step)
                    stopped = stopped or (config.train.on_nonfinite == "stop" and not step.finite)
                    session.log(first + len(steps), metrics(session, step, work, peak))
                pending.clear()
            first_finished = first_finished or time.time()
            stop = steps[-1].asked_to_stop and not pending and not last
            if (due or last or stop) and not stopped and config.train.on_nonfinite != "keep":
                spoiled = nonfinite.spoiled_state(session.engine)
            if spoiled or stopped:
                break
            if due or last or stop:
                if saving is not None:
                    saving.wait()
                heartbeat.beat("saving", session.step)
                saving = save(session, [max(column) for column in zip(*(s.peak_memory for s in steps), strict=True)])
                heartbeat.beat("training", session.step)
            if stop:
                assert saving is not None
                raise Stopped(str(saving.wait().folder.relative_to(session.task.folder)), session.step)
    saved = saving.wait() if saving is not None else None

    unmeasured = throughput.unmeasured(config.train)
    speed = throughput.speed([s.seconds for s in steps], [s.tokens for s in steps], unmeasured)
    median = speed["step_time_s"]["median"]
    measured = steps[unmeasured:] or steps
    per_rank = [max(column) for column in zip(*(s.peak_memory for s in steps), strict=True)]
    world = session.layout.world
    split = profile.split(sum(s.input_seconds for s in measured) / len(measured), session.device)
    return {
        "status": "ok",
        **verdict(session, steps, spoiled, saved.folder.name if saved else None),
        "steps": len(steps),
        "first_step": first,
        **({"changed": session.changed} if session.changed else {}),  # since the checkpoint: [then, now]
        "first_step_finished": first_finished,  # Unix time
        "loss": [s.loss for s in steps],
        "grad_norm": [s.grad_norm for s in steps],
        "learning_rate": [s.learning_rate for s in steps],
        **speed,
        **({"step_split_s": split} if split else {}),  # of the profiled steps; the profiler makes them slower
        "model_flops_per_step": work.model,
        "hardware_flops_per_step": work.hardware,
        "mfu": work.model / median / world / peak if peak else None,
        "hfu": work.hardware / median / world / peak if peak else None,
        "peak_memory_bytes": {"max": max(per_rank), "per_rank": per_rank},
        **({"allocator": of_allocator(steps)} if steps[-1].allocator else {}),  # of accelerators
        "communication": {
            "all_to_all_calls_per_step": steps[-1].all_to_all_calls,
            "all_to_all_bytes_per_step": steps[-1].all_to_all_bytes,
        },
        "checkpoint": str(saved.folder.relative_to(session.task.folder)) if saved else None,
        "weights_identical_across_ranks": checkpoints.weights_identical(session.engine, dist.group.WORLD),
    }


def of_allocator(steps: list[Step]) -> dict[str, dict[str, Any]]:
    """The allocators' figures by name: the worst rank's and each rank's, their highest since training began."""
    found = {}
    for name in steps[-1].allocator:
        per_rank = [max(column) for column in zip(*(s.allocator[name] for s in steps), strict=True)]
        found[name] = {"max": max(per_rank), "per_rank": per_rank}
    return found


def _nothing_to_do(session: Session, work: flops.StepFlops) -> dict[str, Any]:
    """The result where the checkpoint is at `train.steps` already, or beyond. Collective over the world."""
    per_rank = torch.zeros(session.layout.world, dtype=torch.int64, device=session.device)
    per_rank[session.rank] = memory.peak(session.device)
    dist.all_reduce(per_rank)
    return {
        "status": "ok",
        "already_at_step": session.step,
        "steps": 0,
        "first_step": session.step,
        "first_step_finished": None,
        "loss": [],
        "grad_norm": [],
        "learning_rate": [],
        "tokens_per_second": 0.0,
        "tokens_per_step": 0,
        "step_time_s": {"median": 0.0, "p90": 0.0},
        "unmeasured_steps": 0,
        "model_flops_per_step": work.model,
        "hardware_flops_per_step": work.hardware,
        "mfu": None,
        "hfu": None,
        "peak_memory_bytes": {"max": int(per_rank.max()), "per_rank": per_rank.tolist()},
        "communication": {"all_to_all_calls_per_step": 0, "all_to_all_bytes_per_step": 0},
        "checkpoint": None,  # that of the source is the newest
        "weights_identical_across_ranks": checkpoints.weights_identical(session.engine, dist.group.WORLD),
    }


def verdict(
    session: Session, steps: list[Step], spoiled: tuple[str, str] | None, checkpoint: str | None
) -> dict[str, Any]:
    """What the stage's result says of steps that were not finite, in words and in figures; nothing where all were."""
    source = session.task.options.get("checkpoint")
    last = checkpoint or (Path(source).name if source and steps[0].number > 1 else None)
    remedy = "set optim.lr lower" if session.config.optim.lr else "look at the data"
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
    if spoiled is not None:
        kind, name = spoiled
        reason = f"step {steps[-1].number}: {kind} of {name} are not finite after it; {kept}; {remedy}"
        return {"status": "failed", "reason": reason}
    bad = [step for step in steps if not step.finite]
    if not bad:
        return {}
    found: dict[str, Any] = {"nonfinite": bad[0].trouble, "nonfinite_steps": [step.number for step in bad]}
    if skipped := sum(step.skipped for step in steps):
        found["skipped_steps"] = skipped
    where = nonfinite.words(bad[0].trouble or {})
    policy = session.config.train.on_nonfinite
    if policy == "stop":
        found["reason"] = f"{where}; {kept}; {remedy}, or train.on_nonfinite=skip or keep"
    elif policy == "keep":
        found["reason"] = f"{len(bad)} of {len(steps)} steps are not finite, the first: {where}"
    elif len(bad) == len(steps):
        found["reason"] = f"every step was skipped, the first: {where}"
    return found | ({"status": "failed"} if "reason" in found else {})


def metrics(session: Session, step: Step, work: flops.StepFlops, peak: float | None) -> dict[str, float | None]:
    """One line of metrics.jsonl, under the names that the tracker shows."""
    world = session.layout.world
    line: dict[str, float | None] = {
        "train/loss": step.loss,
        "train/grad_norm": step.grad_norm,
        "train/learning_rate": step.learning_rate,
        "perf/tokens_per_second": step.tokens / step.seconds,
        "perf/tokens_per_second_per_rank": step.tokens / step.seconds / world,
        "perf/step_time_s": step.seconds,
        "perf/input_time_s": step.input_seconds,
        "perf/tflops_per_rank": work.model / step.seconds / world / 1e12,
        "memory/peak_bytes_max": max(step.peak_memory),
        "memory/peak_bytes_mean": sum(step.peak_memory) / len(step.peak_memory),
        "comm/all_to_all_bytes": step.all_to_all_bytes,
        "comm/all_to_all_calls": step.all_to_all_calls,
    }
    for name, per_rank in step.allocator.items():
        line[f"memory/{name}_max"] = max(per_rank)
    if step.skipped:
        line["train/skipped"] = 1
    # null where the device's peak is not known, as on CPUs
    line["perf/mfu"] = work.model / step.seconds / world / peak if peak else None
    line["perf/hfu"] = work.hardware / step.seconds / world / peak if peak else None
    return line


def save(session: Session, peak_memory: list[int]) -> checkpoints.Saving:
    """Begins to write `checkpoints/step<N>` of the run folder. Collective.

    Args:
        peak_memory: of each rank since training began, bytes; for a result that is made from the checkpoint.
    """
    session.sync_log()  # a checkpoint counts only with the figures of the steps before it
    folder = session.task.folder / "checkpoints" / f"step{session.step}"
    config = session.config
    state = {
        "seed": config.seed,
        "model": session.model,
        "data_sha256": session.corpus.sha256,
        "peak_memory_bytes": peak_memory,
        "trained_with": lineage.trained_with(config),
    }
    return checkpoints.begin(
        session.engine,
        folder,
        layout=session.layout,
        step=session.step,
        state=state,
        keep=config.checkpoint.keep,
        tokenizer=session.corpus.tokenizer,
        logits=fixed_logits(session),
    )


class Profile:
    """With `train.profile`: torch's profiler over two steps after the unmeasured ones, its trace in the run folder."""

    def __init__(self, session: Session):
        train = session.config.train
        self._target = session.task.folder / "profile" / f"rank{session.rank}.json"
        self._profiler: torch.profiler.profile | None = None
        self._events: list[Any] = []
        if train.profile:
            self._target.parent.mkdir(exist_ok=True)
            wait = min(train.unmeasured_steps, max(0, train.steps - session.step - PROFILED_STEPS - 1))
            self._profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=wait, warmup=1, active=PROFILED_STEPS, repeat=1),
                on_trace_ready=self._ready,
            )

    def _ready(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self._target))
        self._events = list(profiler.events() or ())  # type: ignore[no-untyped-call]

    def __enter__(self) -> Profile:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def step(self) -> None:
        """An optimizer step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def split(self, input_seconds: float, device: torch.device) -> dict[str, float] | None:
        """The split of a step, mean over the ranks; None without a profile. Collective over the world."""
        if self._profiler is None:
            return None
        mine = step_split(self._events, PROFILED_STEPS, input_seconds)
        total = torch.tensor(list(mine.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return dict(zip(mine, (total / dist.get_world_size()).tolist(), strict=True))
