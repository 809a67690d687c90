"""The digest adds up over fragments, whatever their borders, and notices single changes."""

from __future__ import annotations

import pytest
import torch

from ulysses_exp.rank.checkpoints.digest import digest, digest_bytes, digest_where_it_lies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("numel", [0, 1, 7, 40_001])
def test_parts_add_up(dtype: torch.dtype, numel: int) -> None:
    torch.manual_seed(numel)
    tensor = torch.randn(numel, dtype=torch.float64).mul(50).to(dtype)
    whole = digest(tensor)
    for pieces in (1, 2, 3, 5):
        borders = sorted(torch.randint(0, numel + 1, (pieces - 1,)).tolist())
        total = 0
        for begin, end in zip([0, *borders], [*borders, numel], strict=True):
            total += digest(tensor[begin:end], begin)
        assert total % 2**64 == whole


@pytest.mark.parametrize("index", [0, 1, 2, 16_383, 32_768, 40_000])
def test_a_single_bit_counts(index: int) -> None:
    tensor = torch.randn(40_001)
    before = digest(tensor)
    tensor.view(torch.int32)[index] ^= 1 << (index % 32)
    assert digest(tensor) != before


def test_order_and_sign_of_zero_count() -> None:
    assert digest(torch.tensor([1.0, 2.0, 3.0])) != digest(torch.tensor([3.0, 2.0, 1.0]))
    assert digest(torch.tensor([0.0, 0.0])) != digest(torch.tensor([0.0, -0.0]))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 64, 131_072, 131_079, 262_144 * 70 + 3])
@pytest.mark.parametrize("offset", [0, 2, 8, 131_070, 131_072, 8 * 16_384 * 5 + 12])
def test_an_accelerators_way_gives_the_same_digest(size: int, offset: int) -> None:
    """Also where the data lies at no multiple of 8, as a fragment of a flat buffer may."""
    data = torch.randint(256, (size + 4,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    for begin in (0, 1, 4):
        part = data[begin : begin + size]
        assert digest_where_it_lies(part, offset) == digest_bytes(part.numpy(), offset)
