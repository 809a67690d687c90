"""The selective scan of Mamba (arXiv 2312.00752).

What is exchanged: all channels of a slice for some channels of the whole sequence (x, dt and the gate), and B and C of
the whole sequence for every rank, in one all-to-all for each type of number; the output in another. Exact, because the
state of a channel depends on its own x, dt and row of A and on B and C, which all channels share: what a rank sends of
them to all comes back as the sum of their gradients. A, D and the bias of dt have a row a channel: a rank takes those
of its channels, and the sum of gradients over ranks is the whole. Channels need not divide.

Documents: each starts from an empty state (`by_document`).
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
from ulysses_exp.model.mixers.exchange import everywhere, own, to_heads, to_tokens


def around(original: Callable[..., Any], way_of: Callable[[], Way | None]) -> Callable[..., Any]:
    """What takes the place of `mamba_selective_scan`.

    It takes x, dt and the gate z [batch, channels, tokens], A [channels, states], B, C [batch, states, tokens]; it
    returns as x.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def selective_scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None = None, z: Tensor | None = None, delta_bias: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        way = way_of()
        if way is None or way.untouched:
            return original(hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, **kwargs)
        options = told.check(kwargs)
        if options.pop("return_last_state", False):
            raise ValueError("a KV cache in packed documents or under sequence parallelism; set use_cache=False")

        def scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None = None) -> Tensor:
            turned = (t.transpose(1, 2) for t in (x, dt))
            gate = None if z is None else z.transpose(1, 2)
            states = (t.transpose(1, 2) for t in (B, C))
            out: Tensor = original(*turned, A, *states, D=D, z=gate, delta_bias=delta_bias, **options)
            return out.transpose(1, 2)

        assert way.plan is not None
        whole, group = way.plan.documents, way.group
        tensors = [t.transpose(1, 2) for t in (hidden_states, dt, B, C, z) if t is not None]
        if group is None:
            return by_document(scan, tensors, whole).transpose(1, 2)
        sp, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        mine, all_of = own(hidden_states.shape[1], sp), everywhere(B.shape[1], sp)
        tensors = to_heads(tensors, (mine, mine, all_of, all_of, mine)[: len(tensors)], group)
        A, D, delta_bias = (None if p is None else p[slice(*mine[rank])] for p in (A, D, delta_bias))  # type: ignore[assignment]
        out = by_document(scan, tensors, whole) if tensors[0].shape[2] else tensors[0]
        return to_tokens(out, mine, group).transpose(1, 2)

    return selective_scan
