"""Which sequences an optimizer step reads and which slice of them a rank keeps.

Every rank of a sequence-parallel group draws the same sequences and cuts its slice where they are read, so no batch
is ever sent between ranks. Which sequences a step reads does not depend on the layout.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ulysses_exp.config import Config
from ulysses_exp.rank.data.corpus import Corpus
from ulysses_exp.rank.data.sequences import IGNORED, Sequence, draw


@dataclass(frozen=True)
class MicroBatch:
    """int64 tensors. `input_ids`, `labels`, `position_ids`: this rank's slice, [batch, seq_len / sp].
    `global_position_ids` and `global_mask`: the whole sequences, [batch, seq_len], known to every rank without asking;
    the mask is None where nothing is padded."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    global_position_ids: torch.Tensor
    global_mask: torch.Tensor | None
    global_targets: int  # labels of the whole sequences that count, i.e. are not -100

    @property
    def global_tokens(self) -> int:
        """Tokens of the whole sequences, padding not counted."""
        return self.global_position_ids.numel() if self.global_mask is None else int(self.global_mask.sum())


class Batches:
    """The batches of one rank under `config.layout`."""

    def __init__(self, config: Config, corpus: Corpus, rank: int):
        self.config, self.corpus = config, corpus
        layout = config.layout
        self.dp_rank = layout.dp_rank(rank)
        width = config.train.seq_len // layout.sp
        self._reader = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None
        self.slice = slice(layout.sp_rank(rank) * width, (layout.sp_rank(rank) + 1) * width)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro batches of optimizer step `step`, counted from 0; those of the next one are read meanwhile."""
        expected, read = self._next or (-1, None)
        batches = read.result() if read is not None and expected == step else self._read(step)
        self._next = (step + 1, self._reader.submit(self._read, step + 1))
        return batches

    def sequences(self, step: int) -> list[range]:
        """Which sequences of the training data each micro batch of this rank reads in optimizer step `step`."""
        train, dp = self.config.train, self.config.layout.dp
        first = step * train.global_batch_size
        micro = train.micro_batch_size
        starts = [first + (k * dp + self.dp_rank) * micro for k in range(self.config.accumulation)]
        return [range(start, start + micro) for start in starts]

    def _read(self, step: int) -> list[MicroBatch]:
        return [self.micro_batch("train", indices) for indices in self.sequences(step)]

    def micro_batch(self, split: str, indices: range | list[int], whole: bool = False) -> MicroBatch:
        """Sequences `indices` of `split`, cut to this rank's slice, or uncut where one rank evaluates them `whole`."""
        return collate(
            [draw(self.config, self.corpus, split, i) for i in indices], slice(None) if whole else self.slice
        )


def collate(sequences: list[Sequence], part: slice) -> MicroBatch:
    """Stacks sequences of one length and keeps `part` of their tokens."""

    def stack(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays))

    positions = stack([s.position_ids for s in sequences])
    masks = [s.mask for s in sequences if s.mask is not None]
    return MicroBatch(
        input_ids=stack([s.input_ids[part] for s in sequences]),
        labels=stack([s.labels[part] for s in sequences]),
        position_ids=positions[:, part].contiguous(),
        global_position_ids=positions,
        global_mask=stack(masks) if masks else None,
        global_targets=sum(int((s.labels != IGNORED).sum()) for s in sequences),
    )
