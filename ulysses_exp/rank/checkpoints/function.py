"""What a model computes, beside what it holds: logits of a fixed batch, recorded at the save and compared at the load.

Equal weights are no equal model: config.json decides rotary angles, windows, norms and activations.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

FILE = "logits.safetensors"
TOKENS = 64  # of the batch, one sequence
_COLUMNS = 256  # of the vocabulary, evenly spread; the others are in the logsumexp

#: Of the largest logit. One process does the same sums in another order, on another device perhaps; bf16 keeps 8 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def token_ids(vocabulary: int, tokens: int) -> torch.Tensor:
    """The fixed batch, int64 [1, tokens]: no token follows from the one before it."""
    place = torch.arange(tokens)
    return ((31 * place * place + 7 * place + 3) % vocabulary)[None]


def record(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is kept of the fixed batch's logits [tokens, vocabulary], in fp32 in host memory."""
    logits = logits.detach().float()
    width = logits.shape[-1]
    columns = torch.arange(0, width, max(1, -(-width // _COLUMNS)), device=logits.device)
    return {"logits": logits[:, columns].contiguous().cpu(), "logsumexp": logits.logsumexp(-1).cpu()}


def difference(recorded: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest recorded value; nan where one is not finite."""
    worst = 0.0
    scale = max(float(values.abs().max()) for values in recorded.values())
    for name, values in recorded.items():
        if values.shape != now[name].shape:
            return float("inf")
        apart = float((values - now[name]).abs().max()) / max(scale, 1e-30)
        worst = apart if not apart <= worst else worst
    return worst


def write(recorded: dict[str, torch.Tensor], folder: Path) -> str:
    """Writes `FILE` and brings it to disk; returns its SHA-256."""
    data = save(recorded)
    with (folder / FILE).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def read(folder: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Raises ValueError where the file is not what was written."""
    path = folder / FILE
    data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{FILE} is damaged or missing")
    return load(data)


def config_changes(saved: Any, now: Any, prefix: str = "") -> list[str]:
    """The keys of config.json, dotted, that differ, e.g. `rope_theta: 10000.0 -> 500000.0`."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = sorted(saved.keys() | now.keys())
        return [line for key in keys for line in config_changes(saved.get(key), now.get(key), f"{prefix}.{key}")]
    return [] if saved == now else [f"{prefix.lstrip('.')}: {saved!s:.60} -> {now!s:.60}"]
