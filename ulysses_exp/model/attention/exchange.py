"""The fused exchange: q, k and v in one all-to-all, the output in one, and as many back.

Upstream (`UlyssesSPAttentionHF`, DeepSpeed 0.19.8) sends q, k, v and the output one by one, with up to three layout
copies around each, and gathers position_ids in every layer. Here the send buffer is written once, straight from the
projections' layout, and what arrives is used as it lies: rows are global tokens, so q, k and v are strided views of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_exp.config.head_shares import HeadShares
from ulysses_exp.model.attention import uneven


def all_to_all_bytes(
    *,
    sp: int,
    batch: int,
    seq_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    value_head_dim: int | None = None,
    backward: bool = False,
) -> int:
    """Bytes that the busiest rank sends to *other* ranks in one attention layer and one direction.

    The least that Ulysses can send (arXiv 2309.14509, section 3.2, with grouped KV heads): a rank holds
    batch x seq_len / sp tokens, and each of the other sp - 1 ranks gets, of every token, its heads / sp query heads and
    its KV heads (kv_heads / sp, or one where there are fewer KV heads than ranks); the attention output of as many
    query heads goes back. Both exchanges of this project send exactly this. Where heads do not divide, or there are
    more ranks than heads, it is as in `config.head_shares`, and a rank does not send as much in `backward`.
    """
    v_dim = head_dim if value_head_dim is None else value_head_dim
    shares = HeadShares(sp, heads)
    tokens = seq_len // sp
    routes = uneven.Routes(shares, kv_heads, tokens)

    def length(run: tuple[int, int]) -> int:
        return run[1] - run[0]

    def sent(rank: int, other: int) -> int:
        # inputs of attention go to the rank that has the heads, their gradients back to the one that has the tokens
        source, target = (other, rank) if backward else (rank, other)
        asked = sum(s.stop - s.start for s in routes.queries(source, target)) * length(shares.run(target))
        back = sum(s.stop - s.start for s in routes.queries(target, source)) * length(shares.run(source))
        keys = tokens * length(shares.kv_run(target, kv_heads))
        return asked * head_dim + keys * (head_dim + v_dim) + back * v_dim

    most = max(sum(sent(rank, other) for other in range(sp) if other != rank) for rank in range(sp))
    return most * batch * itemsize


def _all_to_all(send: Tensor, group: ProcessGroup) -> Tensor:
    """Block i of dimension 0 goes to rank i of the group; block i of the result came from it."""
    received = torch.empty_like(send)
    torch.distributed.all_to_all_single(received, send, group=group)
    return received


def _pack(parts: list[Tensor], sp: int) -> Tensor:
    """[batch, heads, tokens, dim] each -> [sp, tokens, batch, width]: for every rank its heads of every part.

    A part with fewer heads than ranks has each head copied for the sp / heads ranks that share it.
    """
    batch, _, tokens, _ = parts[0].shape
    widths = [max(1, p.shape[1] // sp) * p.shape[3] for p in parts]
    packed = parts[0].new_empty(sp, tokens, batch, sum(widths))
    for part, slot in zip(parts, packed.split(widths, dim=-1), strict=True):
        heads, dim = part.shape[1], part.shape[3]
        if heads >= sp:
            source = part.unflatten(1, (sp, heads // sp)).permute(1, 3, 0, 2, 4)
            slot.unflatten(-1, (heads // sp, dim)).copy_(source)
        else:
            slot.unflatten(0, (heads, sp // heads)).copy_(part.permute(1, 2, 0, 3).unsqueeze(1))
    return packed


def _unpack(packed: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """The transpose of `_pack`: [sp, tokens, batch, width] -> [batch, heads, tokens, dim] each.

    Copies of a head are summed. The results lie in memory as [batch, tokens, heads, dim], the projections' layout.
    """
    sp, tokens, batch, _ = packed.shape
    parts = []
    for shape, slot in zip(shapes, packed.split([max(1, s[1] // sp) * s[3] for s in shapes], dim=-1), strict=True):
        heads, dim = shape[1], shape[3]
        if heads >= sp:
            part = packed.new_empty(batch, tokens, sp, heads // sp, dim)
            part.copy_(slot.unflatten(-1, (heads // sp, dim)).permute(2, 1, 0, 3, 4))
            part = part.flatten(2, 3)
        else:
            part = slot.unflatten(0, (heads, sp // heads)).sum(1).permute(2, 1, 0, 3)
        parts.append(part.transpose(1, 2))
    return parts


class _ToHeads(torch.autograd.Function):
    """From all heads of some tokens to some heads of all tokens, for q, k and v together."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group, ctx.shapes = group, [query.shape, key.shape, value.shape]
        sp = torch.distributed.get_world_size(group)
        received = _all_to_all(_pack([query, key, value], sp), group).flatten(0, 1)  # [seq_len, batch, width]
        own = [(max(1, s[1] // sp), s[3]) for s in ctx.shapes]
        slots = received.split([heads * dim for heads, dim in own], dim=-1)
        return tuple(slot.unflatten(-1, heads).permute(1, 2, 0, 3) for slot, heads in zip(slots, own, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sp = torch.distributed.get_world_size(ctx.group)
        packed = torch.cat([g.permute(2, 0, 1, 3).flatten(2) for g in grads], dim=-1)  # [seq_len, batch, width]
        received = _all_to_all(packed.unflatten(0, (sp, -1)), ctx.group)
        return (*_unpack(received, ctx.shapes), None)


class _ToTokens(torch.autograd.Function):
    """The way back: [batch, seq_len, heads / sp, dim], some heads of all tokens -> [batch, tokens, heads x dim]."""

    @staticmethod
    def forward(ctx: Any, context: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, context.shape
        sp = torch.distributed.get_world_size(group)
        send = context.flatten(2).unflatten(1, (sp, -1)).transpose(0, 1).contiguous()  # a view where batch is 1
        return _all_to_all(send, group).permute(1, 2, 0, 3).flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sp = torch.distributed.get_world_size(ctx.group)
        send = grads[0].unflatten(2, (sp, -1)).permute(2, 0, 1, 3).contiguous()  # [sp, batch, tokens, width]
        return _all_to_all(send, ctx.group).transpose(0, 1).reshape(ctx.shape), None


class FusedUlyssesAttention(UlyssesSPAttentionHF):
    """`UlyssesSPAttentionHF` with the fused exchange: same constructor, same call, same bypass in eval, same numbers.

    Shapes are taken from the tensors, so micro batch, sequence length, heads and their sizes may change between calls,
    and what the constructor is told of them is not asked. Heads need not divide (`uneven`).
    """

    #: The core attention needs the whole sequence's `position_ids`; switched off where it has them from elsewhere.
    gather_position_ids = True

    def __init__(
        self, attn: Any, *_: Any, process_group: ProcessGroup, disable_in_eval: bool = False, **__: Any
    ) -> None:
        torch.nn.Module.__init__(self)  # upstream's refuses heads that do not divide
        self.attn = attn
        self.process_group = process_group
        self.disable_in_eval = disable_in_eval
        self.world_size = torch.distributed.get_world_size(process_group)
        self.sp_rank = torch.distributed.get_rank(process_group)

    def forward(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Attention over the whole sequence.

        Args:
            query, key, value: [batch, heads, tokens, head_dim], this rank's slice of the sequence, all heads.
            attention_mask: handed on to the core attention as it is.
            kwargs: as well. A sink for each head (`s_aux`) is cut to this rank's heads. With more ranks than heads the
                core attention gets `rows`, the places of its queries in the whole sequence.

        Returns:
            [batch, tokens, heads x head_dim] of this rank's slice, and what else the core attention returns.
        """
        if not module.training and self.disable_in_eval:
            return self.attn(module, query, key, value, attention_mask, *args, **kwargs)
        group, sp = self.process_group, self.world_size
        shares = HeadShares(sp, query.shape[1])
        if self.gather_position_ids and kwargs.get("position_ids") is not None:
            mine = kwargs["position_ids"].contiguous()
            every = [torch.empty_like(mine) for _ in range(sp)]
            torch.distributed.all_gather(every, mine, group=group)
            kwargs["position_ids"] = torch.cat(every, dim=1)
        if kwargs.get("s_aux") is not None:
            kwargs["s_aux"] = kwargs["s_aux"][slice(*shares.run(self.sp_rank))]
        even = shares.even(key.shape[1])
        routes = None if even else uneven.Routes(shares, key.shape[1], query.shape[2])
        if routes is None:
            query, key, value = _ToHeads.apply(query, key, value, group)
        else:
            query, key, value = uneven.to_heads(query, key, value, routes, group)
            if (rows := shares.rows(self.sp_rank, key.shape[2])) is not None:
                kwargs["rows"] = rows
        if hasattr(module, "num_key_value_groups"):
            # with fewer KV heads than ranks, a rank's groups are smaller
            module.num_key_value_groups = query.shape[1] // key.shape[1]  # type: ignore[assignment]
        context, weights = self.attn(module, query, key, value, attention_mask, *args, **kwargs)
        if routes is None:
            return _ToTokens.apply(context, group), weights
        return uneven.to_tokens(context, routes, group), weights
