"""What the ranks of a sequence-parallel group have to know of each other's slices before a forward.

Facts are exchanged before they are judged, so that a batch that cannot run raises the same error on every rank and
nobody is left waiting in a collective.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_exp.model.attention.documents import Documents, documents


def agree(
    group: ProcessGroup,
    shape: tuple[int, int],
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    device: torch.device,
    micro_batch_size: int | None,
) -> Documents:
    """The documents of the whole sequences, from every rank's slice. Collective over `group`: two small gathers.

    Args:
        shape: [batch, tokens] of this rank's slice.
        position_ids: [batch or 1, tokens], global positions; None on every rank: positions run through the sequence.
        attention_mask: [batch, tokens], zero at padding; a rank without one has no padding.
        micro_batch_size: the only batch size that the exchange takes; None: any.

    Raises:
        ValueError: slices differ in length or batch, or only some ranks have position_ids. The same on every rank.
    """
    sp = torch.distributed.get_world_size(group)
    facts = [*shape, position_ids is not None, attention_mask is not None, _fit(position_ids, shape),
             _fit(attention_mask, shape)]  # fmt: skip
    rows = _gather(torch.tensor(facts, device=device), group, sp).tolist()
    batches, lengths, with_positions, with_mask, positions_fit, mask_fits = zip(*rows, strict=True)
    if len(set(lengths)) > 1 or len(set(batches)) > 1:
        what, values = ("tokens", lengths) if len(set(lengths)) > 1 else ("rows", batches)
        raise ValueError(
            f"ranks of a sequence-parallel group hold {', '.join(map(str, values))} {what}; give every rank as many, "
            f"train.seq_len a multiple of sp.size={sp}"
        )
    check_batch(batches[0], micro_batch_size)
    if not all(positions_fit) or not all(mask_fits):
        name = "attention_mask" if all(positions_fit) else "position_ids"
        raise ValueError(f"{name} has another shape than input_ids, {list(shape)}, on some rank; cut both alike")
    if any(with_positions) and not all(with_positions):
        ranks = [rank for rank, present in enumerate(with_positions) if not present]
        raise ValueError(f"ranks {ranks} of the group have no position_ids; give global position_ids to all or to none")
    batch, tokens = shape
    wanted = []
    if any(with_positions):
        wanted.append(position_ids.expand(batch, tokens).to(device, torch.int64))  # type: ignore[union-attr]
    if any(with_mask):
        here = torch.ones(shape, dtype=torch.int64) if attention_mask is None else attention_mask != 0
        wanted.append(here.to(device, torch.int64))
    if not wanted:
        return Documents(batch, tokens * sp)
    whole = _gather(torch.stack(wanted), group, sp).cpu()  # [sp, 1 or 2, batch, tokens]
    whole = whole.permute(1, 2, 0, 3).flatten(2)
    positions = whole[0] if any(with_positions) else torch.arange(tokens * sp).expand(batch, -1)
    return documents(positions, whole[-1] if any(with_mask) else None)


def check_batch(batch: int, micro_batch_size: int | None) -> None:
    """Upstream's exchange is built for one batch size; with another, its ranks wait for each other for ever."""
    if micro_batch_size is not None and batch != micro_batch_size:
        raise ValueError(
            f"a batch of {batch} sequences where sp.exchange=deepspeed is registered for "
            f"train.micro_batch_size={micro_batch_size}; set train.micro_batch_size={batch}, or sp.exchange=fused"
        )


def _fit(tensor: Tensor | None, shape: tuple[int, int]) -> bool:
    return tensor is None or (tensor.dim() == 2 and tensor.shape[1] == shape[1] and tensor.shape[0] in (1, shape[0]))


def _gather(mine: Tensor, group: ProcessGroup, sp: int) -> Tensor:
    """[sp, *shape]: what every rank of the group gives."""
    every = [torch.empty_like(mine) for _ in range(sp)]
    torch.distributed.all_gather(every, mine.contiguous(), group=group)
    return torch.stack(every)
