import pytest

from ulysses_exp.layout import Layout


def test_names_round_trip():
    for layout in (Layout(1, 1, 0), Layout(2, 4, 3), Layout(16, 1, 2)):
        assert Layout.parse(layout.name) == layout


@pytest.mark.parametrize("name", ["", "sp2", "sp2-dp1", "sp2-dp1-z4", "sp-1-dp1-z0", "sp2-dp1-z0 ", "sp0-dp1-z0"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError):
        Layout.parse(name)


def test_ranks_of_a_group_are_contiguous_and_cover_the_world():
    layout = Layout(sp=2, dp=3, zero=0)
    assert [list(layout.sp_group(r)) for r in range(6)] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert [layout.dp_rank(r) for r in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [layout.sp_rank(r) for r in range(6)] == [0, 1, 0, 1, 0, 1]


def test_accumulation_makes_up_the_global_batch():
    assert Layout(4, 2, 1).accumulation(global_batch=16, micro_batch=2) == 4
