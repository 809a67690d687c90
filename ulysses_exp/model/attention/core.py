"""Core attention over whole sequences: causal within documents, within a sliding window, never with an n^2 mask.

Upstream's wrapper (DeepSpeed 0.19.8) hands the core attention no mask at all: under `sdpa` packed documents see each
other and sliding windows are ignored, under `flex_attention` the mask is rebuilt as plain causal (docs/findings.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_exp.model.attention.documents import Documents
from ulysses_exp.model.attention.kernels import cpu, cpu_blocks, flash, flex, recomputed, torch_gpu
from ulysses_exp.model.attention.kernels.pieces import Rows
from ulysses_exp.model.attention.kernels.scores import Scores

Core = Callable[..., tuple[Tensor, Any]]


class Plan:
    """The documents of one forward, and what is made of them once and used in every layer."""

    def __init__(self, whole: Documents):
        self.documents = whole
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def chunked(self, size: int | None) -> Plan:
        """The plan of layers whose tokens see those of their own chunk only."""
        if size is None or size >= self.documents.seq_len:
            return self
        plan: Plan = self.once(("chunks", size), lambda: Plan(self.documents.chunked(size)))
        return plan


@dataclass(frozen=True)
class Way:
    """How a forward runs: over slices, over whole sequences, or as transformers does it."""

    plan: Plan | None  # None: as transformers does it
    group: ProcessGroup | None = None  # whose ranks share the sequences; None: each rank has whole ones

    @property
    def shared(self) -> bool:
        """Over slices."""
        return self.group is not None

    @property
    def untouched(self) -> bool:
        """What runs over whole sequences without documents is what transformers runs."""
        return self.plan is None or (self.group is None and self.plan.documents.plain)


def torchs(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scores: Scores, rows: tuple[Rows, ...] | None = None
) -> Tensor:
    """The fastest of torch's own kernels that is exact for these.

    Args:
        query: [batch, heads, seq_len, head_dim], or the tokens of `rows`.
        key, value: [batch, KV heads, seq_len, head_dim]; KV heads divide query heads.
        rows: places of the queries in the whole sequence, where not all are here.

    Returns:
        [batch, the queries' tokens, heads, dim of a value]; zero at padding.
    """
    whole = plan.documents
    every = ((0, whole.seq_len),)
    simple = whole.plain and scores.window is None and not scores.changed and rows in (None, every)
    if query.device.type == "cpu":
        same_width = query.shape[-1] == value.shape[-1]
        learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if simple and same_width and not (learns and cpu_blocks.helps(query)):
            return torch_gpu.causal(query, key, value, scores.scaling)
        kernel = cpu.attention if scores.softcap is None else recomputed.attention
        out = kernel(query, key, value, whole, rows or every, scores)
        return out.transpose(1, 2)
    if simple:
        return torch_gpu.causal(query, key, value, scores.scaling)
    if scores.changed or rows not in (None, every):
        return flexible(query, key, value, plan, scores, rows)
    if torch_gpu.takes_documents(query, value):
        begins, longest = plan.once(("begins", query.device), lambda: flash.begins(whole, query.device))
        return torch_gpu.of_documents(query, key, value, begins, longest, scores)
    return torch_gpu.one_by_one(query, key, value, whole, scores)


def flexible(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scores: Scores, rows: tuple[Rows, ...] | None = None
) -> Tensor:
    """By flex_attention; arguments and result as of `torchs`."""
    whole, device = plan.documents, query.device
    every = rows or ((0, whole.seq_len),)
    mask = plan.once(("flex", scores.window, every, device),
                     lambda: flex.block_mask(whole, every, scores.window, device))  # fmt: skip
    return flex.attention(query, key, value, mask, scores)


def around(attention: str, original: Callable[..., Any]) -> Core:
    """What runs on whole sequences: the attention of that name, with the documents of the forward respected.

    Args:
        original: transformers' function of that name, for the flash kernels.
    """

    def run(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        plan: Plan,
        rows: tuple[Rows, ...] | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        whole, device = plan.documents, query.device
        window = None if sliding_window is None or sliding_window >= whole.seq_len else sliding_window
        scores = Scores(scaling, window, softcap, s_aux)
        if dropout:
            if not whole.plain or window is not None or scores.changed or rows is not None:
                raise ValueError("attention dropout with documents, windows or sinks; set attention_dropout=0")
            return torch_gpu.causal(query, key, value, scaling, dropout), None
        if attention == "flex_attention":
            return flexible(query, key, value, plan, scores, rows), None
        if attention == "sdpa" or scores.changed or rows is not None:
            return torchs(query, key, value, plan, scores, rows), None
        cuts = None if whole.plain else plan.once(("begins", device), lambda: flash.begins(whole, device))
        kwargs = {"scaling": scaling, "dropout": 0.0, "sliding_window": sliding_window}
        return flash.attention(original, module, query, key, value, cuts, **kwargs)

    return run
