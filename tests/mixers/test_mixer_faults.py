"""What would go wrong is seen: each fault of a kind that others have made moves the numbers that the tests compare."""

from __future__ import annotations

from typing import Any

import hybrid_models as tiny
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from test_mixer_numbers import TOLERANCE, _layouts

from ulysses_exp.model.attention import ulysses
from ulysses_exp.model.mixers import convolution, delta_rule, mamba1, mamba2


def _no_halo(x: torch.Tensor, columns: int, group: Any) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], columns)


def _no_gradient_of_the_halo(x: torch.Tensor, columns: int, group: Any, halo: Any = convolution.halo) -> torch.Tensor:
    return halo(x, columns, group).detach()


def _state_cut(scan: Any, tensors: Any, whole: Any) -> torch.Tensor:
    return torch.cat([scan(*parts) for parts in zip(*(x.chunk(4, 1) for x in tensors), strict=True)], 1)


def _no_documents(scan: Any, tensors: Any, whole: Any) -> torch.Tensor:
    return scan(*tensors)


def _no_gaps(whole: Any, reach: int, columns: tuple[int, int], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    every = torch.arange(columns[1] - columns[0]).expand(whole.batch, -1)
    return every, every


FAULTS: dict[str, tuple[str, str, Any, str, Any]] = {
    "halo left out": ("lfm2", "plain", convolution, "halo", _no_halo),
    "gradient of the halo left out": ("lfm2", "plain", convolution, "halo", _no_gradient_of_the_halo),
    "state cut, delta rule": ("qwen3_next", "plain", delta_rule, "by_document", _state_cut),
    "state cut, mamba 2": ("bamba", "plain", mamba2, "by_document", _state_cut),
    "state cut, mamba": ("mamba", "plain", mamba1, "by_document", _state_cut),
    "documents ignored by the delta rule": ("qwen3_next", "packed", delta_rule, "by_document", _no_documents),
    "documents ignored by mamba 2": ("bamba", "packed", mamba2, "by_document", _no_documents),
    "documents ignored by the convolution": ("lfm2", "packed", convolution, "_gaps", _no_gaps),
    "padding ignored": ("mamba", "padded", mamba1, "by_document", _no_documents),
}


def _with(rank: int, fault: str) -> dict[str, float]:
    family, kind, place, name, instead = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, instead)
        return _layouts(rank, family, kind)


@pytest.mark.parametrize("fault", [f if f.startswith(("halo", "gradient", "documents", "state cut, mamba 2"))
                                   else pytest.param(f, marks=pytest.mark.long) for f in FAULTS])  # fmt: skip
def test_a_fault_shows(ranks: RankPool, fault: str) -> None:
    found = ranks.run(_with, fault)
    assert max(f["gradients at sp 4"] for f in found) > 100 * TOLERANCE, found
    if "gradient" not in fault:
        assert max(f["logits at sp 4"] for f in found) > 50 * TOLERANCE, found


#: Without attention, and with decays so slow that a state keeps what it was told
MEMORIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2},
    "mamba2": {},
    "mamba": {},
}


def _of_the_last_token(network: torch.nn.Module, embedded: torch.Tensor, last: bool) -> torch.Tensor:
    """Gradients of the last token's logits with respect to what goes in; of nothing where it is not here."""
    logits = network(inputs_embeds=embedded, use_cache=False).logits
    weight = torch.randn(tiny.VOCABULARY, generator=torch.Generator().manual_seed(5))
    ((logits[:, -1] * weight).sum() * float(last)).backward()
    assert embedded.grad is not None
    return embedded.grad


def _remembered(rank: int, family: str) -> tuple[float, float]:
    """(gradient of the first token over that of all, error of this rank's gradients over that of all)."""
    network = tiny.model(family, **MEMORIES[family])
    for name, parameter in network.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.constant_(parameter, -8.0)
    whole = torch.randn(2, tiny.LENGTH, 32, generator=torch.Generator().manual_seed(4))
    expected = _of_the_last_token(network, whole.clone().requires_grad_(), True)
    part = slice(rank * 24, (rank + 1) * 24)
    with ulysses(network, sp=4, micro_batch_size=2):
        found = _of_the_last_token(network, whole[:, part].clone().requires_grad_(), rank == 3)
    size = expected.norm()
    return float(expected[:, 0].norm() / size), float((found - expected[:, part]).norm() / size)


@pytest.mark.parametrize("family", MEMORIES)
def test_the_last_token_depends_on_the_first(ranks: RankPool, family: str) -> None:
    for first, error in ranks.run(_remembered, family):
        assert first > 1e-3
        assert error <= TOLERANCE


def _shapes(rank: int, family: str, changes: dict[str, Any]) -> float:
    """The larger error of logits and gradient at sp 4."""
    data = tiny.batch("packed")
    reference, network = tiny.model(family, **changes), tiny.model(family, **changes)
    logits = tiny.alone(reference, data)
    tiny.loss(logits, data).backward()
    part = data.part(4, rank)
    with ulysses(network, sp=4, micro_batch_size=2):
        got = tiny.forward(network, data, part)
        tiny.loss(got, data, part).backward()
    mine = tiny.gradients(network)
    dist.all_reduce(mine)
    return max(tiny.relative(got, logits[:, part]), tiny.relative(mine, tiny.gradients(reference)))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_next", {"linear_num_value_heads": 6, "linear_num_key_heads": 3}),  # 1, 2, 1 and 2 heads; groups are cut
        ("qwen3_next", {"linear_num_value_heads": 2, "linear_num_key_heads": 1}),  # two ranks have none
        ("mamba2", {"hidden_size": 48, "num_heads": 6, "head_dim": 16, "n_groups": 3}),
        ("lfm2", {"conv_L_cache": 30}),  # more than a slice of 24 tokens
    ],
)
def test_heads_and_slices_need_not_fit(ranks: RankPool, family: str, changes: dict[str, Any]) -> None:
    assert max(ranks.run(_shapes, family, changes)) <= TOLERANCE
