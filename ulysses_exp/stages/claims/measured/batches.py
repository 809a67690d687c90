"""The batches that evaluation is asked with: everything that a sharded sequence could not be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PLAIN, LEFT, RIGHT = "plain", "left-padded", "right-padded"
_LONGEST = 128  # tokens: beyond the window of the tiny models, and still fast


@dataclass(frozen=True)
class Batch:
    """Whole sequences, [rows, tokens]; `position_ids` and `mask` are None where the model is told nothing."""

    name: str
    input_ids: Tensor
    position_ids: Tensor | None = None
    mask: Tensor | None = None
    documents: tuple[int, ...] = ()  # lengths of those that share a row; none: a row is one

    def inputs(self, part: slice = slice(None), device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Arguments of the model's forward, at `part` of the tokens."""
        given = {"input_ids": self.input_ids, "position_ids": self.position_ids, "attention_mask": self.mask}
        return {name: tensor[:, part].to(device) for name, tensor in given.items() if tensor is not None}

    def real(self, values: Tensor) -> Tensor:
        """Of [rows, tokens, ...] those at real tokens, [real tokens, ...]."""
        return values.flatten(0, 1) if self.mask is None else values[self.mask.bool()]


def batches(vocabulary: int, rank: int, seq_len: int, registered: int) -> list[Batch]:
    """This rank's own, other than any other rank's in their tokens and some in their shapes.

    Args:
        registered: sequences in a batch that the attention was registered with.
    """
    length = min(seq_len, _LONGEST)
    rows = max(2, registered)

    def ids(rows: int, tokens: int, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * rank + seed)
        return torch.randint(0, vocabulary, (rows, tokens), generator=draw)

    def positions(rows: int, *documents: int) -> Tensor:
        return torch.cat([torch.arange(tokens) for tokens in documents]).expand(rows, -1).contiguous()

    mask = torch.ones(rows, length, dtype=torch.int64)
    left, right = mask.clone(), mask.clone()
    left[0, : length // 3], right[0, -(length // 3) :] = 0, 0
    half = length // 2
    return [
        Batch(PLAIN, ids(registered, length, 0), positions(registered, length)),
        Batch("odd length", ids(registered, length - 1, 1), positions(registered, length - 1)),
        Batch("ragged", ids(registered, half + 1 + rank, 2), positions(registered, half + 1 + rank)),
        Batch("another size", ids(registered + 2, half, 3), positions(registered + 2, half)),
        Batch(LEFT, ids(rows, length, 4), (left.cumsum(1) - 1).masked_fill(left == 0, 1), left),
        Batch(RIGHT, ids(rows, length, 5), positions(rows, length), right),
        # a row of documents end to end, told apart by positions that restart
        Batch("packed", ids(1, length, 6), positions(1, half, length - half), None, (half, length - half)),
    ]


def common(vocabulary: int, seq_len: int, rows: int) -> Batch:
    """Plain sequences, the same on every rank, of which each can take its slice."""
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(0, vocabulary, (rows, seq_len), generator=draw)
    return Batch("common", ids, torch.arange(seq_len).expand(rows, -1).contiguous())


def samples(vocabulary: int, seq_len: int) -> list[Batch]:
    """Rows of one length, as a collator pads them: the same on every rank, more than any two batches take."""
    length = min(seq_len, _LONGEST)
    found = []
    for index in range(9):
        kind = (PLAIN, LEFT, RIGHT)[index % 3]
        draw = torch.Generator().manual_seed(100 + index)
        mask = torch.ones(1, length, dtype=torch.int64)
        if kind == LEFT:
            mask[0, : length // 3] = 0
        elif kind == RIGHT:
            mask[0, -(length // 3) :] = 0
        found.append(Batch(kind, torch.randint(0, vocabulary, (1, length), generator=draw), None, mask))
    return found
