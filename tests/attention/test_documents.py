"""Positions and padding to segments."""

from __future__ import annotations

import pytest
import torch

from ulysses_exp.model.attention.documents import Documents, Segment, documents


def rows(
    position_ids: list[list[int]], mask: list[list[int]] | None = None
) -> list[list[tuple[int, int, bool]]] | None:
    found = documents(torch.tensor(position_ids), None if mask is None else torch.tensor(mask))
    return None if found.rows is None else [[(s.start, s.stop, s.padding) for s in row] for row in found.rows]


def test_one_document_a_row_is_plain() -> None:
    assert rows([[0, 1, 2, 3], [5, 6, 7, 8]]) is None
    assert rows([[0, 1, 2, 3]], [[1, 1, 1, 1]]) is None


def test_a_document_begins_where_positions_do_not_go_on() -> None:
    assert rows([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]) == [[(0, 3, False), (3, 5, False)], [(0, 5, False)]]
    assert rows([[0, 1, 1, 7, 8]]) == [[(0, 2, False), (2, 3, False), (3, 5, False)]]


@pytest.mark.parametrize("positions", [[1, 1, 0, 1, 2], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
def test_left_padding_is_one_run_whatever_its_positions(positions: list[int]) -> None:
    assert rows([positions], [[0, 0, 1, 1, 1]]) == [[(0, 2, True), (2, 5, False)]]


def test_padding_may_lie_right_and_between_documents() -> None:
    assert rows([[0, 1, 2, 0, 1, 0]], [[1, 1, 0, 1, 1, 0]]) == [
        [(0, 2, False), (2, 3, True), (3, 5, False), (5, 6, True)]
    ]


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4], [0, 1, 1, 2, 3]])
def test_padding_inside_a_document_is_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="row 0 has padding inside a document, at tokens 2 to 2"):
        rows([positions], [[1, 1, 0, 1, 1]])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="give the 2D padding mask"):
        documents(torch.arange(4)[None], torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"expected \[batch, seq_len\]"):
        documents(torch.arange(4))


def test_fake_tensors_count_as_plain() -> None:
    with torch._subclasses.FakeTensorMode():
        assert documents(torch.arange(8).expand(2, 8)) == Documents(2, 8)


def test_tables() -> None:
    whole = Documents(1, 5, ((Segment(0, 3), Segment(3, 5)),))
    assert whole.table(torch.device("cpu")).tolist() == [[0, 0, 0, 1, 1]]
    assert whole.positions(torch.device("cpu")).tolist() == [[0, 1, 2, 0, 1]]
