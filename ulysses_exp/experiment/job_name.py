"""What the folder of a sweep's job is called: letters, digits, `.`, `_` and `-`, nothing that a shell reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ulysses_exp.config import ConfigError

#: Short names of what is swept most, in the order in which they stand in a name; others follow by their own names
_SHORT = {
    "model": "model", "sp": "sp", "sp.size": "sp", "dp.size": "dp", "zero": "zero", "zero.stage": "z",
    "train.seq_len": "len", "train.global_batch_size": "batch", "train.micro_batch_size": "micro",
    "train.precision": "precision", "memory": "memory", "data": "data", "optim": "optim", "optim.lr": "lr",
    "eval": "eval", "eval.mode": "eval", "train.steps": "steps", "checkpoint.source": "source", "seed": "seed",
}  # fmt: skip

_LONGEST = 100  # characters before the part that tells names apart that were cut


def job_name(overrides: Iterable[str], number: int, axes: Collection[str]) -> str:
    """The folder of a job, from what the sweep varies, e.g. `sp2-z3-len4096`.

    What all jobs share is no part of it, so a sweep that is called again with another `train.steps` finds its jobs
    changed and runs them again in their places. Two jobs of a sweep never have the same name: where a value cannot be
    written as it is, or could be read as two, the name ends in a digest of all of them.

    Args:
        overrides: of the job, e.g. `sp.size=2`, in any order.
        number: of the job, its name where nothing is varied.
        axes: keys that the sweep varies.
    """
    varied = [(part.partition("=")[0].lstrip("+~"), part) for part in overrides]
    varied = sorted(((key, part) for key, part in varied if key in axes), key=lambda pair: _place(pair[0]))
    if not varied:
        return str(number)
    shorts = [_short(key) for key, _ in varied]
    pieces, whole = [], True
    for (key, part), short in zip(varied, shorts, strict=True):
        value = part.partition("=")[2]
        text, as_it_is = _text(value)
        pieces.append(_joined(key if shorts.count(short) > 1 else short, text))
        whole = whole and as_it_is
    name = "-".join(pieces)
    if not whole or len(name) > _LONGEST:
        digest = hashlib.sha256(json.dumps([part for _, part in varied]).encode()).hexdigest()[:8]
        name = f"{name[:_LONGEST].rstrip('-_.')}-{digest}"
    return name


def check_names(folder: Path, key: str) -> None:
    """Raises ConfigError where jobs in the sweep `folder` have names that 0.1 gave, such as `sp.size=2,zero.stage=3`.

    They would be run again beside themselves, and a report would show each twice.
    """
    if not folder.is_dir():
        return
    old = sorted(path.name for path in folder.iterdir() if "=" in path.name and (path / "results.json").exists())
    if old:
        problem = f"{folder} holds {len(old)} jobs that an earlier version named otherwise, e.g. {old[0][:60]}"
        raise ConfigError(key, problem, "set another name for the sweep; what is there can still be read and reloaded")


def _place(key: str) -> tuple[int, str]:
    known = list(_SHORT)
    return (known.index(key) if key in _SHORT else len(known)), key


def _short(key: str) -> str:
    return _SHORT.get(key) or re.sub(r"[^A-Za-z0-9._-]+", "_", key.rpartition(".")[2])


def _text(value: str) -> tuple[str, bool]:
    """`value` in the characters of a name, and whether it can be read back from that; of a path its last folder."""
    bare = value.strip("'\"")
    last = bare.rstrip("/").rpartition("/")[2]
    if re.fullmatch(r"-?[0-9][0-9.]*(e-?[0-9]+)?", last, re.IGNORECASE):  # of a number the minus stays
        return last, last == bare
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", last).strip("_-") or "_"
    return text, text == bare and "-" not in text


def _joined(short: str, text: str) -> str:
    """`sp2`, but `model_tiny_qwen3` and `beta2_0.9`."""
    return f"{short}{text}" if text[0].isdigit() and not short[-1].isdigit() else f"{short}_{text}"
