"""One training sequence: tokens, the labels they predict, their positions, and which of them are padding.

Sequence `index` of a split is a function of (seed, index) alone: every rank, layout and resumed run draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ulysses_exp.config import Config
from ulysses_exp.rank.data.corpus import Corpus

IGNORED = -100  # the label that transformers and torch.nn.functional.cross_entropy leave out


@dataclass(frozen=True)
class Sequence:
    """int64 arrays of [seq_len]. `labels[t]` is the token after `input_ids[t]`: they are shifted already, so that no
    label is lost where a rank's slice ends. `mask` is 1 at real tokens, 0 at padding; None where all are real."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    mask: np.ndarray | None


def draw(config: Config, corpus: Corpus, split: str, index: int) -> Sequence:
    """Sequence `index` of `split` (`train` or `eval`)."""
    rng = np.random.default_rng([config.seed, 1 if split == "train" else 2, index])
    tokens = corpus.train if split == "train" else corpus.eval
    length = config.train.seq_len
    if config.data.name == "packed":
        ids, labels, positions = _packed(rng, tokens, length, config.data.mean_document)
    else:
        ids, labels = _crop(rng, tokens, length)
        positions = np.arange(length)
    if config.data.ignore_labels:
        labels[: int(rng.uniform(0, config.data.ignore_labels) * length)] = IGNORED
    if config.data.padding == "none":
        return Sequence(ids, labels, positions, None)
    return _pad(ids, labels, positions, int(rng.integers(length // 2, length + 1)), config.data.padding)


def _crop(rng: np.random.Generator, tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`length` consecutive tokens from a random place and the tokens after each; a short text is read in a circle."""
    start = int(rng.integers(0, max(1, len(tokens) - length)))
    window = tokens.take(np.arange(start, start + length + 1), mode="wrap")
    return window[:-1].copy(), window[1:].copy()


def _packed(
    rng: np.random.Generator, tokens: np.ndarray, length: int, mean: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of geometric length, end to end; positions restart and the last token of each predicts nothing."""
    ids, labels, positions = (np.empty(length, dtype=np.int64) for _ in range(3))
    start = 0
    while start < length:
        size = min(length - start, 1 + int(rng.geometric(1 / mean)))
        place = slice(start, start + size)
        ids[place], labels[place] = _crop(rng, tokens, size)
        labels[start + size - 1] = IGNORED
        positions[place] = np.arange(size)
        start += size
    return ids, labels, positions


def _pad(ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, real: int, side: str) -> Sequence:
    """Keeps the first `real` tokens and pads on one side; positions count real tokens, as in transformers' generate."""
    length = len(ids)
    place = slice(0, real) if side == "right" else slice(length - real, length)
    padded_ids, padded_positions = np.zeros(length, np.int64), np.zeros(length, np.int64)
    padded_labels, mask = np.full(length, IGNORED), np.zeros(length, np.int64)
    padded_ids[place], padded_labels[place], padded_positions[place], mask[place] = (
        ids[:real],
        labels[:real],
        positions[:real],
        1,
    )
    return Sequence(padded_ids, padded_labels, padded_positions, mask)
