"""A row of documents, cut into pieces that one call of a kernel computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ulysses_exp.model.attention.documents import Row, Segment

#: Queries of a window that one call computes, against the window before them: between these two
_LEAST_BLOCK, _LARGEST_BLOCK = 64, 256

#: Rows [start, stop) of the whole sequence.
Rows = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Some queries of a row against a run of its keys.

    Attributes:
        queries: places among the queries at hand.
        keys: places in the whole sequence.
        causal: a square, in which a query sees the keys up to its own place; else all keys, or those of the window.
        again: the queries see other keys in the piece before.
        ahead: with a window, the place of the first query less that of the first key; else None.
    """

    queries: slice
    keys: slice
    causal: bool = False
    again: bool = False
    ahead: int | None = None


def pieces(row: Row, rows: Sequence[Rows], window: int | None) -> Iterator[Piece]:
    """Of a row of documents, for the queries of `rows`, which follow each other; each query with all keys it sees.

    Args:
        window: a token sees itself and the `window` - 1 tokens before it; None: all before it.
    """
    for begin, end, start, at in _runs(row, rows):
        whole = end if window is None else max(begin, min(end, start + window))
        if begin < whole:
            here = slice(at, at + whole - begin)
            if begin > start:
                yield Piece(here, slice(start, begin))
            yield Piece(here, slice(begin, whole), causal=True, again=begin > start)
        if window is not None:
            size = min(max(window, _LEAST_BLOCK), _LARGEST_BLOCK)
            yield from _blocks(whole, end, start, at + whole - begin, window, size)


def blocks(row: Row, rows: Sequence[Rows], window: int | None, size: int) -> Iterator[Piece]:
    """As `pieces`, in blocks of at most `size` queries, each with all keys that it sees in one piece."""
    for begin, end, start, at in _runs(row, rows):
        yield from _blocks(begin, end, start, at, window, size)


def _runs(row: Row, rows: Sequence[Rows]) -> Iterator[tuple[int, int, int, int]]:
    """Queries of one document that follow each other: first and last place, the document's start, where they lie."""
    offset = 0
    for first, last in rows:
        for segment in row:
            begin, end = max(first, segment.start), min(last, segment.stop)
            if begin < end and not segment.padding:
                yield begin, end, segment.start, offset + begin - first
        offset += last - first


def _blocks(begin: int, end: int, start: int, at: int, window: int | None, size: int) -> Iterator[Piece]:
    for first in range(begin, end, size):
        last = min(first + size, end)
        key = start if window is None else max(start, first - window + 1)
        yield Piece(slice(at + first - begin, at + last - begin), slice(key, last), ahead=first - key)


def seen(piece: Piece, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, keys] of a piece that is not whole: what each query sees."""
    ahead = piece.ahead or 0
    query = torch.arange(piece.queries.stop - piece.queries.start, device=device)[:, None] + ahead
    key = torch.arange(piece.keys.stop - piece.keys.start, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def by_rows(documents_rows: tuple[Row, ...] | None, batch: int, seq_len: int) -> list[tuple[slice, Row]]:
    """Rows of a batch that are cut alike, together."""
    if documents_rows is None:
        return [(slice(0, batch), (Segment(0, seq_len),))]
    if len(set(documents_rows)) == 1:
        return [(slice(0, batch), documents_rows[0])]
    return [(slice(b, b + 1), row) for b, row in enumerate(documents_rows)]
