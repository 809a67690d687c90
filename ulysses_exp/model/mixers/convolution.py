"""Causal convolutions: each token sees itself and the K - 1 before it.

What is exchanged: a rank gets the last K - 1 columns before its slice (a halo), and sends their gradient back; slices
shorter than that reach over several ranks. Exact, because that is all that the convolution of a slice reads: it runs
on [halo, slice] with all channels, and what it says of the halo is dropped. No weight is cut, so the gradients of a
rank are those of its tokens, and their sum over ranks is the whole.

Documents: K - 1 columns of zeros are put before each, as the convolution itself has them before a sequence, and its
output is taken from where the tokens went. Padding is a document of its own. The function that runs is the model's own
on a longer sequence, so a kernel of whatever package it comes from keeps its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from ulysses_exp.model.attention.core import Way
from ulysses_exp.model.attention.documents import Documents
from ulysses_exp.model.mixers import told
from ulysses_exp.model.mixers.exchange import halo


def around(original: Callable[..., Tensor], way_of: Callable[[], Way | None]) -> Callable[..., Tensor]:
    """What takes the place of `causal_conv1d_fn`: x [batch, channels, tokens], weight [channels, K] -> as x."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def convolve(hidden_states: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        way = way_of()
        if way is None or way.untouched:
            return original(hidden_states, weight, *args, **kwargs)
        kwargs = told.check(kwargs)
        assert way.plan is not None
        x, reach, start = hidden_states, weight.shape[-1] - 1, 0
        if way.group is not None:
            start = torch.distributed.get_rank(way.group) * x.shape[-1]
            x = torch.cat([halo(x, reach, way.group), x], -1)
        before = x.shape[-1] - hidden_states.shape[-1]
        whole = way.plan.documents
        if whole.plain:
            return original(x, weight, *args, **kwargs)[..., before:]
        columns = (start - before, start + hidden_states.shape[-1])
        key = ("gaps", reach, columns, x.device)
        opened, closed = way.plan.once(key, lambda: _gaps(whole, reach, columns, x.device))
        with_zeros = torch.nn.functional.pad(x, (0, 1))
        out = original(_taken(with_zeros, opened), weight, *args, **kwargs)
        return _taken(out, closed[:, before:])

    return convolve


def _gaps(whole: Documents, reach: int, columns: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where columns [first, last) of the sequence go when each document has `reach` zeros before it.

    Returns:
        ([batch, longer]: the column that stands there, one past the last for a zero; [batch, columns]: where each went)
    """
    first, last = columns
    begins = np.zeros((whole.batch, last - first), np.int64)
    for b, row in enumerate(whole.rows or ()):
        for segment in row:
            if max(first, 0) < segment.start < last:
                begins[b, segment.start - first] = 1
    places = np.arange(last - first) + reach * begins.cumsum(1)
    opened = np.full((whole.batch, int(places.max()) + 1), last - first)
    np.put_along_axis(opened, places, np.arange(last - first)[None], 1)
    return torch.tensor(opened, device=device), torch.tensor(places, device=device)


def _taken(x: Tensor, columns: Tensor) -> Tensor:
    """The columns [batch, n] of x [batch, channels, tokens]."""
    if columns.shape[0] == 1:
        return x.index_select(-1, columns[0])
    return x.gather(-1, columns[:, None].expand(-1, x.shape[1], -1))
