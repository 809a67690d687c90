"""The scan of Mamba 2 (arXiv 2405.21060).

What is exchanged: all heads of a slice for some heads of the whole sequence (x, dt, B and C in one all-to-all for each
type of number, the output in another). Exact, because the state of a head depends on its own x, dt and A and on its
group's B and C; the gated norm, which may go over all heads, comes after the way back. A, D and dt_bias have an entry
a head: a rank takes those of its heads, its gradient is zero elsewhere, and the sum over ranks is the whole. B and C
have groups of heads: a rank gets those that its heads use. Heads need not divide.

Documents: each starts from an empty state (`by_document`). `fused` stands for upstream's kernel of convolution, scan
and projection in one: it returns None, by which the model takes them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ulysses_exp.model.attention.core import Way
from ulysses_exp.model.mixers import told
from ulysses_exp.model.mixers.by_document import by_document
from ulysses_exp.model.mixers.exchange import expanded, of_groups, own, to_heads, to_tokens


def around(original: Callable[..., Any], way_of: Callable[[], Way | None]) -> Callable[..., Any]:
    """What takes the place of `mamba2_chunk_scan`.

    It takes x [batch, tokens, heads, dim], dt [batch, tokens, heads], A [heads], B, C [batch, tokens, groups, states];
    it returns as x.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def chunk_scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None = None, dt_bias: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        way = way_of()
        if way is None or way.untouched:
            return original(hidden_states, dt, A, B, C, D=D, dt_bias=dt_bias, **kwargs)
        options = told.check(kwargs)
        if options.pop("z", None) is not None or options.pop("return_final_states", False):
            raise ValueError("a gate or a last state in mamba2_chunk_scan, which is not known here; set sp.size=1")

        def scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
            out: Tensor = original(x, dt, A, B, C, D=D, dt_bias=dt_bias, **options)
            return out

        assert way.plan is not None
        whole, group = way.plan.documents, way.group
        if group is None:
            return by_document(scan, (hidden_states, dt, B, C), whole)
        sp, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        heads, groups = hidden_states.shape[2], B.shape[2]
        mine, used = own(heads, sp), of_groups(heads, groups, sp)
        x, dt, B, C = to_heads((hidden_states, dt, B, C), (mine, mine, used, used), group)
        A, D, dt_bias = (None if p is None else p[slice(*mine[rank])] for p in (A, D, dt_bias))  # type: ignore[assignment]
        B, C = (expanded(p, heads, groups, group) for p in (B, C))
        out = by_document(scan, (x, dt, B, C), whole) if x.shape[2] else x
        return to_tokens(out, mine, group)

    return chunk_scan


def fused(original: Callable[..., Any], way_of: Callable[[], Way | None]) -> Callable[..., Any]:
    """What takes the place of a kernel that does a whole layer, where it may not."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def layer(*args: Any, **kwargs: Any) -> Any:
        way = way_of()
        return original(*args, **kwargs) if way is None or way.untouched else None

    return layer
