"""Which tokens of a batch may see each other, read from position ids and padding on the host.

A sequence-parallel rank holds a slice, so the mask that transformers builds on it is of no use, and a mask of the whole
sequence has n^2 entries. Documents say the same in a few integers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a row: a document, or a run of padding. Tokens see earlier ones of their own segment."""

    start: int
    stop: int
    padding: bool = False


Row = tuple[Segment, ...]


@dataclass(frozen=True)
class Documents:
    """The segments of each row, in order and without gaps; `rows` is None where every row is one document."""

    batch: int
    seq_len: int
    rows: tuple[Row, ...] | None = None

    @property
    def plain(self) -> bool:
        """Nothing but causality decides what a token sees."""
        return self.rows is None

    @property
    def padded(self) -> bool:
        return self.rows is not None and any(s.padding for row in self.rows for s in row)

    def chunked(self, size: int) -> Documents:
        """Each document cut again at multiples of `size` tokens from its start (Llama 4; transformers 5.23)."""
        whole = ((Segment(0, self.seq_len),),) * self.batch
        rows = (
            tuple(
                Segment(start, min(start + size, s.stop), s.padding)
                for s in row
                for start in range(s.start, s.stop, size)
            )
            for row in self.rows or whole
        )
        return Documents(self.batch, self.seq_len, tuple(rows))

    def table(self, device: torch.device) -> torch.Tensor:
        """int32 [batch, seq_len]: the number of the segment that a token belongs to."""
        ids = np.zeros((self.batch, self.seq_len), np.int32)
        for b, row in enumerate(self.rows or ()):
            for number, segment in enumerate(row):
                ids[b, segment.start : segment.stop] = number
        return torch.tensor(ids, device=device)

    def positions(self, device: torch.device) -> torch.Tensor:
        """int64 [batch, seq_len]: positions that start at 0 in every segment."""
        ids = np.tile(np.arange(self.seq_len), (self.batch, 1))
        for b, row in enumerate(self.rows or ()):
            for segment in row:
                ids[b, segment.start : segment.stop] -= segment.start
        return torch.tensor(ids, device=device)


def documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Documents:
    """The documents of whole sequences.

    A document begins where a position is not its predecessor plus one: the rule of
    `transformers.masking_utils.find_packed_sequence_indices` (5.23). Runs of padding are set apart, left, right or
    between documents. (transformers looks for documents only where no padding mask is given; here both count.)

    Args:
        position_ids: [batch, seq_len] on the host. A fake tensor has no values: every row is taken as one document.
        attention_mask: [batch, seq_len], zero at padding; None where nothing is padded.

    Raises:
        ValueError: shapes do not fit, or padding lies inside a document.
    """
    if position_ids.dim() != 2:
        raise ValueError(f"position_ids have shape {tuple(position_ids.shape)}, expected [batch, seq_len]")
    batch, seq_len = position_ids.shape
    if attention_mask is not None and attention_mask.shape != position_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, position_ids {tuple(position_ids.shape)}; "
            "under sequence parallelism give the 2D padding mask, [batch, seq_len]"
        )
    positions, real = _values(position_ids), None if attention_mask is None else _values(attention_mask)
    if positions is None:
        return Documents(batch, seq_len)
    begins = np.diff(positions, axis=1) != 1
    if real is not None:
        real = real != 0
        # the positions of padding mean nothing: 0, 1 or going on, by tokenizer
        begins = (begins & real[:, 1:] & real[:, :-1]) | (real[:, 1:] != real[:, :-1])
    if not begins.any() and (real is None or real.all()):
        return Documents(batch, seq_len)
    rows = []
    for b in range(batch):
        edges = [0, *(np.flatnonzero(begins[b]) + 1).tolist(), seq_len]
        row = tuple(
            Segment(start, stop, real is not None and not real[b, start]) for start, stop in itertools.pairwise(edges)
        )
        _refuse_holes(b, row, positions[b])
        rows.append(row)
    return Documents(batch, seq_len, tuple(rows))


def _values(tensor: torch.Tensor) -> np.ndarray | None:
    """The numbers of a tensor; None where it has none (a fake tensor, as used in planning)."""
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return None
    with unset_fake_temporarily():  # a tensor with values may be announced while the model is traced without
        return tensor.cpu().numpy()


def _refuse_holes(b: int, row: Row, positions: np.ndarray) -> None:
    """Padding inside a document: the two parts would have to see each other, which segments cannot say."""
    for before, gap, after in zip(row, row[1:], row[2:], strict=False):
        if gap.padding and not before.padding and not after.padding:
            step = positions[after.start] - positions[before.stop - 1]
            if step in (1, after.start - before.stop + 1):
                raise ValueError(
                    f"row {b} has padding inside a document, at tokens {gap.start} to {gap.stop - 1}; "
                    "pad left, right or between documents (whose position_ids start anew)"
                )
