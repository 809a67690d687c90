"""The gated delta rule (arXiv 2412.06464) and Kimi's delta attention, which decays each channel by itself.

What is exchanged: all heads of a slice for some heads of the whole sequence, as in attention (q, k, v, decay g and
beta in one all-to-all for each type of number, the output in another). Exact, because heads do not see each other and
the state of a head depends on its own q, k, v, g and beta alone; A_log, dt_bias and all projections were applied token
by token before, norm and gate come after the way back. Key heads are fewer than value heads in some models: a rank
gets those that its value heads use, and what it sends to several ranks comes back as a sum. Heads need not divide.

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
from ulysses_exp.model.mixers.exchange import expanded, of_groups, own, to_heads, to_tokens


def around(original: Callable[..., Any], way_of: Callable[[], Way | None]) -> Callable[..., Any]:
    """What takes the place of a delta rule over a sequence.

    It takes query, key [batch, tokens, key heads, dim], value [batch, tokens, heads, dim], g [batch, tokens, heads] or
    with a dim, beta [batch, tokens, heads]; it returns (as value, the last state or None).
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **kwargs: Any) -> Any:
        way = way_of()
        if way is None or way.untouched:
            return original(query, key, value, g=g, beta=beta, **kwargs)
        options = told.check(kwargs)

        def scan(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            out: Tensor = original(query, key, value, g=g, beta=beta, **options)[0]
            return out

        assert way.plan is not None
        whole, group = way.plan.documents, way.group
        if group is None:
            return by_document(scan, (query, key, value, g, beta), whole), None
        heads, groups, sp = value.shape[2], key.shape[2], torch.distributed.get_world_size(group)
        mine, used = own(heads, sp), of_groups(heads, groups, sp)
        query, key, value, g, beta = to_heads((query, key, value, g, beta), (used, used, mine, mine, mine), group)
        query, key = (expanded(x, heads, groups, group) for x in (query, key))
        out = by_document(scan, (query, key, value, g, beta), whole) if value.shape[2] else value
        return to_tokens(out, mine, group), None

    return rule
