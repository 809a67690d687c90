"""Stage `eval`: held-out loss with sequence parallelism bypassed, with it on, or both and compared."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ulysses_exp.rank.data.sequences import IGNORED
from ulysses_exp.rank.evaluation import logits, summed_loss
from ulysses_exp.rank.session import Session

#: Relative. The two modes do the same sums in another order; measured in fp32: 0 to 1e-7.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}

#: Of a rank's free memory, what `eval.mode=auto` plans for; the rest is for fragments and what else the machine does.
_SHARE_OF_FREE = 0.8


def evaluate(session: Session) -> dict[str, Any]:
    """Runs `eval.mode` over the first `eval.sequences` held-out sequences. Collective."""
    session.resume()
    mode, why = choose_mode(session)
    result: dict[str, Any] = {
        "status": "ok", "mode": mode, "step": session.step, "sequences": session.config.eval.sequences
    }  # fmt: skip
    if why:
        result["mode_reason"] = why
    session.engine.eval()
    with torch.no_grad():
        for name in ("bypass", "sp"):
            if mode in (name, "both"):
                result[name] = _loss(session, bypass=name == "bypass")
        if mode == "both":
            result["max_abs_logit_diff"] = _logit_difference(session)
            compare(result, LOSS_TOLERANCE[session.config.train.precision])
    session.attention.disable_in_eval = True
    session.engine.train()
    check_finite(result)
    return result


def check_finite(result: dict[str, Any]) -> None:
    """Fails `result` where a loss in it is not finite."""
    bad = [f"{name} {result[name]['loss']}" for name in ("bypass", "sp")
           if name in result and not math.isfinite(result[name]["loss"])]  # fmt: skip
    if bad:
        reason = f"the held-out loss is not finite ({', '.join(bad)}): the weights or the data hold nan or infinity"
        result.update(status="failed", reason=reason)


def compare(result: dict[str, Any], tolerance: float) -> None:
    """Adds to `result` how far the two modes' losses are apart, and fails it beyond `tolerance`, relative."""
    bypass, sp = result["bypass"]["loss"], result["sp"]["loss"]
    result["abs_loss_diff"] = abs(bypass - sp)
    if not abs(bypass - sp) <= tolerance * abs(bypass):
        reason = f"the loss with sequence parallelism is {sp:.6g}, bypassed {bypass:.6g}: beyond {tolerance:g} relative"
        result.update(status="failed", reason=reason)


def choose_mode(session: Session) -> tuple[str, str | None]:
    """What `auto` means here, and why: bypass where one rank's memory holds the whole sequence, else sp."""
    mode = session.config.eval.mode
    if mode != "auto":
        return mode, None
    if session.layout.sp == 1:
        return "bypass", "one rank holds the sequence anyway"
    need = session.task.options.get("bypassed_evaluation_bytes")
    if need is None:
        return "sp", "how much memory a whole sequence needs on one rank could not be planned"
    free = _free_bytes(session)
    return ("bypass" if need < _SHARE_OF_FREE * free else "sp"), (
        f"a whole sequence needs {need / 2**20:,.0f} MiB on one rank by the plan, {free / 2**20:,.0f} MiB are free"
    )


def _free_bytes(session: Session) -> int:
    """Free memory of the tightest rank."""
    if session.device.type == "cuda":
        free = torch.cuda.mem_get_info(session.device)[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        free = available // session.layout.world
    tightest = torch.tensor(free, device=session.device)
    dist.all_reduce(tightest, op=dist.ReduceOp.MIN)
    return int(tightest)


def _loss(session: Session, bypass: bool) -> dict[str, Any]:
    """Mean loss over the held-out targets, each counted once."""
    layout, total = session.layout, session.config.eval.sequences
    # bypass: every rank evaluates sequences of its own; sp: the ranks of a group share theirs
    owners, mine = (layout.world, session.rank) if bypass else (layout.dp, layout.dp_rank(session.rank))
    rounds = math.ceil(total / owners)  # the same on all ranks: under ZeRO 3 a forward is collective
    sums = torch.zeros(3, dtype=torch.float64, device=session.device)  # loss, targets, tokens
    dist.barrier()
    began, mark = time.perf_counter(), session.all_to_alls.now
    for i in range(rounds):
        index = i * owners + mine
        batch = session.batches.micro_batch("eval", [min(index, total - 1)], whole=bypass)
        summed = summed_loss(session, batch, bypass)
        if index < total:
            sums[0] += summed.double()
            sums[1] += int((batch.labels != IGNORED).sum())
            sums[2] += batch.global_tokens / (1 if bypass else layout.sp)
    calls = torch.tensor(session.all_to_alls.since(mark)[0], device=session.device)
    dist.all_reduce(sums)
    dist.all_reduce(calls, op=dist.ReduceOp.MAX)
    seconds = time.perf_counter() - began
    loss = float(sums[0] / sums[1].clamp(min=1))
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "all_to_all_calls": int(calls),
        "tokens_per_second": float(sums[2]) / seconds,
    }


#: Bytes of fp32 logits of a whole sequence up to which the two modes' are compared at every token
LOGITS_BYTES = 2**30


def _places(session: Session, tokens: int, vocabulary: int) -> torch.Tensor | None:
    """Places of this rank's slice at which logits are compared, evenly spaced; None: all."""
    mine = tokens // session.layout.sp
    most = LOGITS_BYTES // (4 * vocabulary * session.layout.sp)
    return None if mine <= most else torch.linspace(0, mine - 1, max(1, most)).long()


def _logit_difference(session: Session) -> float:
    """Largest difference between the two modes' logits at real tokens, over one sequence per data-parallel rank.

    Of a long sequence at as many tokens as `LOGITS_BYTES` hold: whole logits of 131,072 tokens and 128,256 words are
    63 GiB.
    """
    index = [session.layout.dp_rank(session.rank) % session.config.eval.sequences]
    whole = session.batches.micro_batch("eval", index, whole=True)
    shared = session.batches.micro_batch("eval", index)
    part = session.batches.slice
    places = _places(session, whole.input_ids.shape[1], session.engine.module.config.get_text_config().vocab_size)
    if places is None:
        bypassed = logits(session, whole, True)[:, part]
    else:
        bypassed = logits(session, whole, True, places + part.start)
    difference = (bypassed - logits(session, shared, False, places)).abs().amax(-1)
    if whole.global_mask is not None:
        mask = whole.global_mask[:, part]
        difference = difference * session.to_device(mask if places is None else mask[:, places])
    largest = difference.max().double()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)
