"""Verdicts are made of what was counted, by one function: another count, another verdict."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from checkout import ROOT

from ulysses_exp.config import ConfigError, resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.layout import Layout
from ulysses_exp.stages.claims import layouts
from ulysses_exp.stages.claims.cell import DOES_NOT, HOLDS, HOLDS_IF, NOT_TRIED, Cell
from ulysses_exp.stages.claims.judgement import judged
from ulysses_exp.stages.claims.layouts import in_words
from ulysses_exp.stages.claims.sentences import CLAIMS
from ulysses_exp.stages.claims.summary import summary

_MODE = {"calls": 4, "off": 1e-7}
_TRIES = [("itself", "sp2-dp1-z1"), ("other sp, same world", "sp1-dp2-z1"), ("other world", "sp1-dp1-z1")]

#: What a rank counts where a claim holds
GOOD: dict[str, dict[str, Any]] = {
    "C1": {"all_to_alls": 0, "others_in_attention": 0, "others": {}, "calls": 8, "arrived": 8, "moved": 0,
           "batches": ["plain", "odd"], "refused": {}},
    "C2": {"all_to_alls": 0, "others": 0, "arrived": 1, "moved": 0, "equal": True},
    "C3": {"modes": [{"mode": mode, "bypassed": bypass, "expected_bypass": bypass, **_MODE}
                     for mode, bypass in (("train", False), ("eval", True), ("train again", False))]},
    "C4": {"off": {"plain": 0.0, "left-padded": 0.0}, "trainer": {"plain": 0.0}, "samples": 9, "seen": 9},
    "C5": {"before": "a", "after": "b", "whole": 100,
           "bytes": {"weights": 100, "gradients": 100, "optimizer": 200, "activations": 50}},
    "C6": {"elements": 10, "whole": 10, "missing": [], "files": {"a.pt": 40}, "with_weights": ["a.pt"]},
    "C7": {"opened": [{"kind": kind, "target": target, "weights": True, "states": True} for kind, target in _TRIES]},
    "C8": {"ways": {"save_checkpoint()": "exact"}},
    "C9": {"states": 4, "whole": 4},
    "C10": {"factor": 1.0000001, "off": 1e-6, "equal": True, "world": 2, "collectives": {"allreduce of 2": 3}},
}  # fmt: skip

#: (claim, what else is counted, the verdict, words that tell why, the finding)
FAULTS: list[tuple[str, dict[str, Any], str, str, int | None]] = [
    ("C1", {"all_to_alls": 1}, DOES_NOT, "2 all-to-alls are made", None),
    ("C1", {"others_in_attention": 1}, DOES_NOT, "2 other collectives", None),
    ("C1", {"moved": 1}, DOES_NOT, "does not get the model's own tensors", None),
    ("C1", {"arrived": 7}, DOES_NOT, "does not get the model's own tensors", None),
    ("C1", {"refused": {"odd": "AssertionError: shape"}}, DOES_NOT, "AssertionError: shape", None),
    ("C1", {"others": {"allgather of 2": 4}}, HOLDS_IF, "a rank makes 4 allgather of 2", None),
    ("C2", {"all_to_alls": 2}, DOES_NOT, "4 collectives", None),
    ("C2", {"moved": 1}, DOES_NOT, "own tensors", None),
    ("C2", {"equal": False}, DOES_NOT, "not the original attention's", None),
    ("C3", {"modes": [{"mode": "eval", "bypassed": False, "expected_bypass": True, **_MODE}]}, DOES_NOT, "sharded", 4),
    ("C3", {"modes": [{"mode": "train", "bypassed": False, "expected_bypass": False, "off": 0.1}]}, DOES_NOT, "off", 4),
    ("C4", {"off": {"plain": 0.0, "left-padded": 0.3}}, DOES_NOT, "left-padded: off by 3.0e-01", 5),
    ("C4", {"off": {"plain": None}}, DOES_NOT, "plain: off by inf", 4),
    ("C4", {"off": {"packed": 0.3}}, DOES_NOT, "packed", 3),
    ("C4", {"trainer": {"left-padded": 0.3}}, DOES_NOT, "Trainer, left-padded", 5),
    ("C4", {"seen": 8}, DOES_NOT, "8 of 9 sequences", None),
    ("C5", {"bytes": {**GOOD["C5"]["bytes"], "weights": 50}}, HOLDS_IF, "holds 50 B of 100 B", None),
    ("C6", {"whole": 9, "missing": ["lm_head.weight"]}, DOES_NOT, "lm_head.weight", 24),
    ("C8", {"ways": {"save_checkpoint()": "OSError: no file", "save_16bit_model()": "exact"}}, HOLDS_IF, "OSError", 26),
    ("C8", {"ways": {"save_checkpoint()": "3 weights differ"}}, DOES_NOT, "3 weights differ", 26),
    ("C9", {"whole": 0, "converter": "ds_to_universal", "converted": 4}, HOLDS_IF, "ds_to_universal", None),
    ("C9", {"whole": 0, "converter": "ds_to_universal", "converter_error": "tp_degree=2"}, DOES_NOT, "tp_degree", 16),
    ("C9", {"states": 0, "whole": 0}, DOES_NOT, "0 states", None),
    ("C10", {"factor": 2.0}, DOES_NOT, "2.0000 times the true one", 1),
    ("C10", {"factor": None}, DOES_NOT, "no number", 1),
    ("C10", {"off": 0.5}, DOES_NOT, "points elsewhere", 4),
    ("C10", {"equal": False}, DOES_NOT, "different weights", 1),
]  # fmt: skip


def of(claim: str, counted: Any) -> Cell:
    return judged(claim, "upstream", "sp2-dp1-z1", counted)


@pytest.mark.parametrize("claim", GOOD)
def test_what_is_right_holds(claim: str) -> None:
    ranks = [GOOD[claim], GOOD[claim]] if claim != "C7" else [GOOD[claim]]
    assert (of(claim, ranks).verdict, of(claim, ranks).why) == (HOLDS, "")


@pytest.mark.parametrize(("claim", "other", "verdict", "words", "finding"), FAULTS, ids=lambda value: str(value)[:30])
def test_another_count_turns_the_verdict(claim, other, verdict, words, finding) -> None:
    rank = copy.deepcopy(GOOD[claim]) | other
    cell = of(claim, [rank, rank])
    assert (cell.verdict, cell.finding) == (verdict, finding) and words in cell.why, cell


def test_one_rank_with_other_weights_is_enough() -> None:
    for when in ("before", "after"):
        cell = of("C5", [GOOD["C5"], GOOD["C5"] | {when: "c"}])
        assert cell.verdict == DOES_NOT and f"{when} training" in cell.why


def test_a_checkpoint_that_opens_in_some_layouts_holds_if() -> None:
    tries = copy.deepcopy(GOOD["C7"])
    tries["opened"][2] = {"kind": "other world", "target": "sp1-dp1-z1", "error": "ZeRORuntimeException: 2 ranks"}
    cell = of("C7", [tries])
    assert cell.verdict == HOLDS_IF and "sp1-dp2-z1" in cell.why and "2 ranks" in cell.why and cell.finding == 25
    tries["opened"][1]["states"] = False
    assert of("C7", [tries]).verdict == DOES_NOT
    tries["opened"][0]["weights"] = False
    assert "weights differ" in of("C7", [tries]).why


def test_errors_and_what_was_not_tried_are_cells() -> None:
    for claim in CLAIMS:
        failed = of(claim.key, {"error": "rank 1: ValueError: no such heads"})
        assert failed.verdict == DOES_NOT and "no such heads" in failed.why
        assert of(claim.key, {"not_tried": "needs 9 TiB"}).verdict == NOT_TRIED
    gloo = {"error": "rank 2: ValueError: Global rank 0 is not part of group <object at 0x7>"}
    assert of("C10", gloo).finding == 2 and judged("C10", "here", "sp2-dp1-z1", gloo).finding is None
    assert of("C10", gloo).verdict == DOES_NOT and "0x7" not in of("C10", gloo).why
    assert of("C6", gloo).verdict == NOT_TRIED, "a checkpoint that nobody could write is no broken one"


def test_the_summary_says_where() -> None:
    every = [Layout(sp, 1, zero) for sp in (1, 2) for zero in (0, 3)]
    cells = [Cell("C10", "upstream", layout.name, HOLDS, "1") for layout in every]
    assert summary(cells, every) == {"verdict": HOLDS, "figure": "1"}
    cells[2] = Cell("C10", "upstream", "sp2-dp1-z0", DOES_NOT, "2", "twice", 1)
    found = summary(cells, every)
    assert found == {
        "verdict": HOLDS_IF, "figure": "2", "finding": 1,
        "why": "sp 1; sp 2 with ZeRO 3 (not at sp 2 with ZeRO 0: twice)",
    }  # fmt: skip
    none = [Cell("C1", "here", layout.name, NOT_TRIED, "-", "too large") for layout in every]
    assert summary(none, every)["verdict"] == NOT_TRIED
    half = [*cells[:2], *none[2:]]
    assert summary(half, every) == {"verdict": HOLDS, "figure": "1", "why": "not tried at sp 2"}


def test_layouts_in_words() -> None:
    every = [Layout(sp, 1, zero) for sp in (1, 2, 4) for zero in range(4)]
    assert in_words(every, every) == "every layout"
    assert in_words([layout for layout in every if layout.zero < 3], every) == "ZeRO 0 to 2"
    assert in_words([layout for layout in every if layout.sp > 1 and layout.zero in (1, 2)], every) == (
        "sp 2, 4 with ZeRO 1, 2"
    )


def test_a_layout_that_the_model_has_not_is_a_cell_and_not_an_error() -> None:
    config = resolve(composed(["stages=[claims]", "device=cpu", "claims.layouts=[sp1-dp1-z0,sp3-dp1-z0]"])[0])
    first, second = layouts.asked(config)
    assert layouts.impossible(config, first) is None
    assert layouts.impossible(config, second) == "512 tokens do not divide over sp 3"


@pytest.mark.parametrize(
    ("value", "said"),
    [("[]", "is empty"), ("[sp2]", "is not a layout"), ("[sp2-dp1-z0,sp2-dp1-z0]", "twice"), ("[sp3-dp1-z0]", "sp 3")],
)
def test_layouts_that_cannot_be_measured_are_refused(value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        resolve(composed(["stages=[claims]", "device=cpu", f"claims.layouts={value}"])[0])
    assert refused.value.key == "claims.layouts"


def test_every_finding_that_a_verdict_names_is_there() -> None:
    text = (ROOT / "docs/findings.md").read_text()
    named = {finding for *_, finding in FAULTS if finding} | {2, 25}
    assert all(re.search(rf"^## {number}\. ", text, re.MULTILINE) for number in named)
