"""No mask of n x n is made: not at sp 1, not under sequence parallelism, not in bypassed evaluation."""

from __future__ import annotations

from typing import Any

import masked_batches as tiny
import pytest
import torch
from rank_pool import RankPool
from torch.utils._python_dispatch import TorchDispatchMode

from ulysses_exp.model.attention import ulysses


class _Squares(TorchDispatchMode):
    """Counts tensors of [..., n, n]: masks, and scores."""

    def __init__(self, n: int):
        super().__init__()
        self.n, self.found = n, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (self.n, self.n):
                self.found += 1
        return out


def _model(family: str) -> torch.nn.Module:
    return tiny.model(family, intermediate_size=80)  # another width than there are tokens


def _squares(rank: int, family: str, kind: str) -> dict[str, int]:
    """Of forward, backward and bypassed evaluation; `unpatched` shows that the spy sees what it is to see."""
    data, n, found = tiny.batch(kind), tiny.LENGTH, {}
    with _Squares(n) as spy:
        tiny.forward(_model(family), data)
    found["unpatched"] = spy.found
    for sp in (1, 2):
        part = data.part(sp, rank)
        network = _model(family)
        with ulysses(network, sp=sp, micro_batch_size=2), _Squares(n) as spy:
            tiny.loss(tiny.forward(network, data, part), data, part).backward()
            with torch.no_grad():
                tiny.forward(network.eval(), data)
        found[f"sp {sp}"] = spy.found
    return found


@pytest.mark.parametrize("family", ["gqa", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("kind", ["packed", "left"])
def test_no_dense_mask(ranks: RankPool, family: str, kind: str) -> None:
    for found in ranks.run(_squares, family, kind):
        assert found.pop("unpatched") > 0
        assert found == {"sp 1": 0, "sp 2": 0}
