"""One type of model under `ulysses()`, beside one process of the unpatched model that reads each document alone.

`tried` runs in a process of its own, which ranks are forks of: they find the model and what is right in its memory.
"""

from __future__ import annotations

import copy
import inspect
import math
import multiprocessing
import os
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models_kinds import kinds_of_layers
from torch import Tensor
from transformers import PreTrainedModel

import ulysses_exp
from ulysses_exp.model.attention import ulysses
from ulysses_exp.model.tiny import built, tiny

PACKAGE = str(Path(ulysses_exp.__file__).resolve().parents[1])
WORLD, SIZES = 4, (2, 4)
LOGITS, GRADIENTS = 1e-5, 1e-5  # relative, by norm; gradients of all parameters together
MOST_ROUNDING = 1e-4  # of a gradient, where the reference itself is rounded by more than the tolerance
SHOWS = 1e-3  # a slice that sees nothing of the others has to be that far off, or nothing is shown by being right
TOKENS, FIRST, LAST = 48, 5, 90
#: Documents of each row of a batch, as lengths; of padded rows the real tokens.
BATCHES = {
    "plain": ((48,), (48,)),
    "packed": ((13, 4, 22, 9), (30, 2, 16)),
    "right": ((29,), (41,)),
    "left": ((37,), (46,)),
}
_AFTER_AN_ERROR_S = 5  # for the ranks that did not raise it


@dataclass(frozen=True)
class Batch:
    """Whole sequences. `labels` is -100 where no token of the same document follows."""

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    labels: Tensor
    documents: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def targets(self) -> int:
        return int((self.labels != -100).sum())


def batch(kind: str) -> Batch:
    lengths = BATCHES[kind]
    ids = torch.randint(FIRST, LAST, (len(lengths), TOKENS), generator=torch.Generator().manual_seed(3))
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    mask = torch.zeros_like(ids) if kind in ("left", "right") else None
    documents = []
    for row, sizes in enumerate(lengths):
        start = TOKENS - sum(sizes) if kind == "left" else 0
        edges = []
        for size in sizes:
            edges.append((start, start + size))
            positions[row, start : start + size] = torch.arange(size)
            labels[row, start : start + size - 1] = ids[row, start + 1 : start + size]
            start += size
        if kind == "right":
            positions[row] = torch.arange(TOKENS)
        if mask is not None:
            mask[row, edges[0][0] : edges[0][1]] = 1
            ids[row, mask[row] == 0] = 0
        documents.append(tuple(edges))
    return Batch(ids, positions, mask, labels, tuple(documents))


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Logits; positions are left out where the model takes none."""
    known = inspect.signature(model.forward).parameters
    arguments = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
    given = {name: value for name, value in arguments.items() if value is not None and name in known}
    return model(input_ids=ids, **given).logits


def loss(logits: Tensor, labels: Tensor, targets: int) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum") / targets


def gradient(model: PreTrainedModel) -> Tensor:
    """Of all parameters, one after the other; zero where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def alone(model: PreTrainedModel, data: Batch) -> tuple[Tensor, Tensor]:
    """Logits, zero at padding, and gradient of the unpatched model, which reads each document by itself."""
    model.zero_grad()
    rows = []
    for row, documents in enumerate(data.documents):
        here = None
        for start, stop in documents:
            got = forward(model, data.ids[row : row + 1, start:stop], torch.arange(stop - start)[None])
            loss(got, data.labels[row : row + 1, start:stop], data.targets).backward()
            here = got.new_zeros(TOKENS, got.shape[-1]) if here is None else here
            here[start:stop] = got[0].detach()
        rows.append(here)
    return torch.stack(rows), gradient(model)


def far(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


# -- in the ranks


def on_rank(rank: int, model: PreTrainedModel, right: dict[str, Any], kind: str, sp: int) -> dict[str, Any]:
    """How far off the logits of this rank's group are, also from the unpatched model on the whole batch, which may
    itself differ from documents alone, and the gradient of all its ranks together."""
    data = batch("plain" if kind == "unnumbered" else kind)
    width = TOKENS // sp
    part = slice(rank % sp * width, (rank % sp + 1) * width)
    model.zero_grad()
    entered = False
    try:
        with ulysses(model, sp=sp, exchange="fused", micro_batch_size=len(data.ids)) as handle:
            entered = True
            mask = None if data.mask is None else data.mask[:, part]
            if kind == "unnumbered":
                with torch.no_grad():
                    logits = forward(model, data.ids[:, part], None)
            else:
                handle.begin(data.positions, data.mask)
                logits = forward(model, data.ids[:, part], data.positions[:, part], mask)
                loss(logits, data.labels[:, part], data.targets).backward()
            group = handle.mpu.get_sequence_parallel_group()
            off = {}
            if kind != "unnumbered":
                summed = gradient(model)
                dist.all_reduce(summed, group=group)
                off["gradient"] = far(summed, right[kind][1])
            expected = right[kind][0]
            real = torch.ones_like(data.ids) if data.mask is None else data.mask
            for what, other in (("logits", expected), ("from_whole", right.get(f"{kind} whole", (expected,))[0])):
                squares = ((logits.detach() - other[:, part]) * real[:, part, None]).square().sum()
                dist.all_reduce(squares, group=group)
                off[what] = float(squares.sqrt() / expected.norm())
            return off
    except Exception as error:
        return {"error": said(error), "refused": _ours(error), "at": "forward" if entered else "entry"}


def said(error: BaseException) -> str:
    """In a line."""
    text = " ".join(str(error).split()) or "no more said"
    text = text if len(text) < 240 else f"{text[:240]}..."
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _ours(error: BaseException) -> bool:
    """Whether this project raised it on purpose."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    ours = raised.filename.startswith(f"{PACKAGE}{os.sep}ulysses_exp{os.sep}")
    return ours and (raised.line or "").startswith("raise ")


def judged(kind: str, off: dict[str, float], model: PreTrainedModel) -> dict[str, Any]:
    """The result of a trial: a gradient beyond the tolerance may be within what fp32 rounds in the reference itself.

    That is measured only then, as the distance of the reference's gradient from its own in fp64.
    """
    if off["logits"] > LOGITS or not math.isfinite(off["logits"]):
        return {"result": "wrong", **off}
    if "gradient" in off and not off["gradient"] <= GRADIENTS:
        data = batch(kind)
        own = far(alone(model, data)[1].double(), alone(copy.deepcopy(model).double(), data)[1])
        good = off["gradient"] <= min(own, MOST_ROUNDING)
        return {"result": "right" if good else "wrong", **off, "rounding": own}
    return {"result": "right", **off}


class Ranks:
    """Forks of this process that meet by gloo, started anew after one of them was left behind by others."""

    def __init__(self, model: PreTrainedModel, right: dict[str, Any], folder: str):
        self.model, self.right, self.folder, self.starts = model, right, folder, 0
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.starts += 1
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=self._serve, args=(rank, f"{self.folder}/store{self.starts}", there))
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def _serve(self, rank: int, store: str, pipe: Connection) -> None:
        import deepspeed

        os.environ["LOCAL_RANK"] = str(rank)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=300)
        )
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        while True:
            try:
                kind, sp = pipe.recv()
            except EOFError:
                os._exit(0)
            pipe.send(on_rank(rank, self.model, self.right, kind, sp))

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def outcome(self, kind: str, sp: int, within_s: float) -> dict[str, Any]:
        """Of one trial: `result`, and `logits` and `gradient` or `reason`."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((kind, sp))
        found: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + within_s
        while len(found) < WORLD and (left := until - time.monotonic()) > 0:
            for pipe in wait([p for r, p in enumerate(self.pipes) if r not in found], timeout=left):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    found[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    found[rank] = {"error": "the rank died", "refused": False, "at": "forward"}
                if "error" in found[rank]:
                    until = min(until, time.monotonic() + _AFTER_AN_ERROR_S)
        errors = [one for one in found.values() if "error" in one]
        if len(found) < WORLD or len({one.get("error") for one in found.values()}) > 1:
            self.stop()
        if errors:
            worst = min(errors, key=lambda one: one["refused"])
            return {"result": "refused" if worst["refused"] else "crashed", "reason": worst["error"], "at": worst["at"]}
        if len(found) < WORLD:
            return {
                "result": "crashed",
                "reason": f"hangs: {WORLD - len(found)} ranks gave nothing in {within_s:.0f} s",
            }
        off = {what: float(f"{max(one[what] for one in found.values()):.3g}") for what in found[0]}
        return judged(kind, off, self.model)


def tried(kind: str, within_s: float, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """The result of a type of model, `trials` by name, and what kinds of layers it has."""
    torch.set_num_threads(1)
    try:
        return tried_model(built(tiny(kind)), within_s, sizes) | {"layers": kinds_of_layers(kind)}
    except Exception as error:
        return {"result": "not buildable", "reason": said(error), "trials": {}}


def tried_model(model: PreTrainedModel, within_s: float, sizes: tuple[int, ...]) -> dict[str, Any]:
    right: dict[str, Any] = {kind: alone(model, batch(kind)) for kind in BATCHES}
    with torch.no_grad():
        for kind in BATCHES:
            data = batch(kind)
            right[f"{kind} whole"] = (forward(model, data.ids, data.positions, data.mask), None)
        data = batch("plain")
        right["unnumbered"] = (forward(model, data.ids, None), None)
        half = slice(TOKENS // 2, None)
        unseen = far(forward(model, data.ids[:, half], data.positions[:, half]), right["plain"][0][:, half])
    if not all(right[kind][0].isfinite().all() for kind in (*BATCHES, "unnumbered")):
        return {"result": "not buildable", "reason": "its tiny copy gives no finite logits", "trials": {}}
    if unseen < SHOWS:
        reason = f"a slice of its tiny copy that sees no other is off by {unseen:.0e} alone: nothing would show"
        return {"result": "not buildable", "reason": reason, "trials": {}}
    trials: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(model, right, folder)
        try:
            for sp in sizes:
                for kind in (*BATCHES, "unnumbered"):
                    trials[f"{kind} sp{sp}"] = one = ranks.outcome(kind, sp, within_s)
                    if one["result"] == "refused" and one["at"] == "entry":
                        break  # the model is, whatever its batches
        finally:
            ranks.stop()
    result = next(r for r in ("wrong", "crashed", "refused", "right") if r in {t["result"] for t in trials.values()})
    return {"result": result, "reason": _reason(result, trials), "trials": trials, "unseen": unseen}


def _reason(result: str, trials: dict[str, dict[str, Any]]) -> str:
    """Of the trials with this result: which they are, unless all, and what is said of the first or worst."""
    if result == "right":
        rounded = [trial for trial in trials.values() if "rounding" in trial]
        if not rounded:
            return ""
        most, own = max(trial["gradient"] for trial in rounded), min(trial["rounding"] for trial in rounded)
        return f"gradient off by {most:.1e}, where fp32 alone rounds the reference's by {own:.1e}"
    these = {name: trial for name, trial in trials.items() if trial["result"] == result}
    if result != "wrong":
        which = "" if len(these) == len(trials) else ", ".join(these) + ": "
        return which + next(iter(these.values()))["reason"]
    parts = []
    for as_is in (False, True):
        some = {name: t for name, t in these.items() if (t["from_whole"] <= LOGITS) == as_is}
        off = {what: [t[what] for t in some.values() if what in t] for what in ("logits", "gradient")}
        said = ", ".join(f"{what} off by {max(values):.1e}" for what, values in off.items() if values)
        if some:
            like = ", where the unpatched model on the whole batch is as far off" if as_is else ""
            parts.append(f"{', '.join(some)}: {said}{like}")
    return "; ".join(parts)
