"""Logits and gradients in every layout are those of one process, each document alone."""

from __future__ import annotations

import hybrid_models as tiny
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

from ulysses_exp.model.attention import ulysses

TOLERANCE = 1e-5  # relative, of all logits and of the whole gradient: single parameters may be nearly zero
KINDS = ("plain", "packed", "padded", "packed_and_padded")


def expected(family: str, data: tiny.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, gradients) of the unpatched model."""
    network = tiny.model(family)
    logits = tiny.alone(network, data)
    tiny.loss(logits, data).backward()
    return logits.detach(), tiny.gradients(network)


def _layouts(rank: int, family: str, kind: str) -> dict[str, float]:
    """The largest errors of logits and gradients over sp 1, 2 and 4; the batch announced at 4, gathered at 2."""
    data = tiny.batch(kind)
    logits, gradient = expected(family, data)
    network = tiny.model(family)
    found: dict[str, float] = {}
    for sp in (1, 2, 4):
        part = data.part(sp, rank)
        network.zero_grad()
        with ulysses(network, sp=sp, micro_batch_size=2) as handle:
            if sp == 4:
                handle.begin(data.position_ids, data.mask)
            got = tiny.forward(network, data, part, mask=sp != 4)
            tiny.loss(got, data, part).backward()
            mine = tiny.gradients(network)
            if sp > 1:
                dist.all_reduce(mine, group=handle.mpu.get_sequence_parallel_group())
        real = data.real[:, part, None]
        found[f"logits at sp {sp}"] = tiny.relative(got * real, logits[:, part] * real) if real.any() else 0.0
        found[f"gradients at sp {sp}"] = tiny.relative(mine, gradient)
    return found


@pytest.mark.parametrize("family", [f if f in tiny.SHORT else pytest.param(f, marks=pytest.mark.long)
                                    for f in tiny.FAMILIES])  # fmt: skip
def test_every_layout_gives_the_numbers_of_each_document_alone(ranks: RankPool, family: str) -> None:
    for kind in KINDS[: 3 if family in tiny.SHORT else None]:  # the last one is of the two before it
        for found in ranks.run(_layouts, family, kind):
            assert max(found.values()) <= TOLERANCE, (kind, found)
