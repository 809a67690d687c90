"""`experiment=claims` as a user runs it: exit code, table, results.json, and what the report makes of it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.report import pictures, runs
from ulysses_exp.report.page import page
from ulysses_exp.stages.claims.sentences import CLAIMS, SIDES

PICTURES = {"claims_communication", "claims_memory", "claims_opening"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, command) -> tuple[Path, str]:
    """Two layouts of a model in a local folder, and one that it has not; the folder, and what was printed."""
    place = tmp_path_factory.mktemp("claims")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(place / "model")
    done = command(
        "experiment=claims", "model=hub", f"model.name_or_path={place / 'model'}", "data=synthetic", "train.seq_len=64",
        "claims.layouts=[sp2-dp1-z1,sp2-dp1-z3,sp3-dp1-z0]", "device=cpu", "hydra.run.dir=run",
        "tracker.mode=offline", cwd=place, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "run", done.stdout


@pytest.mark.long
def test_every_claim_has_a_cell_for_each_side_and_layout(run) -> None:
    folder, printed = run
    stage = json.loads((folder / "results.json").read_text())["stages"]["claims"]
    assert stage["status"] == "ok"
    for claim in CLAIMS:
        assert claim.key in printed and stage[claim.key]["claim"] == claim.sentence
        for side in SIDES:
            cells = stage[claim.key][side]["cells"]
            assert list(cells) == ["sp2-dp1-z1", "sp2-dp1-z3", "sp3-dp1-z0"]
            assert cells["sp3-dp1-z0"]["verdict"] == "not tried" and "64 tokens" in cells["sp3-dp1-z0"]["why"]
    upstream = {claim.key: stage[claim.key]["upstream"]["cells"] for claim in CLAIMS}
    verdicts = {
        key: (cells["sp2-dp1-z1"]["verdict"], cells["sp2-dp1-z3"]["verdict"]) for key, cells in upstream.items()
    }
    assert verdicts == {
        "C1": ("holds", "holds if"), "C2": ("holds", "holds"), "C3": ("holds", "holds"),
        "C4": ("does not hold", "does not hold"), "C5": ("holds", "holds if"), "C6": ("holds", "does not hold"),
        "C7": ("holds if", "holds if"), "C8": ("holds if", "holds if"), "C9": ("does not hold", "holds if"),
        "C10": ("does not hold", "holds"),
    }  # fmt: skip
    here = {claim.key: [c["verdict"] for c in stage[claim.key]["here"]["cells"].values()][:2] for claim in CLAIMS}
    assert {key for key, found in here.items() if found != ["holds", "holds"]} == {"C1", "C5"}  # what ZeRO 3 gathers
    for key, cells in upstream.items():
        for cell in cells.values():
            assert cell["verdict"] != "does not hold" or cell["finding"], f"{key} names no finding: {cell}"
    assert not (folder / "claims").exists(), "checkpoints are removed"


@pytest.mark.long
def test_the_report_and_the_page_show_it(run, tmp_path) -> None:
    folder, _ = run
    (found,) = runs.find([folder])
    assert not found.damaged
    drawn = {picture.name: picture for picture in pictures.draw([found])}
    assert set(drawn) >= PICTURES
    assert "claims that hold" in page("claims", [found]).table.titles
    script = runpy.run_path(str(ROOT / "benchmarks/claims.py"))
    by_family = dict(zip(script["FAMILIES"], (drawn[name] for name in sorted(PICTURES)), strict=True))
    text = script["document"](json.loads((folder / "results.json").read_text()), by_family)
    for claim in CLAIMS:
        assert f"### {claim.key}" in text and claim.sentence.split(",")[0] in text
    assert "findings.md#1-the-gradients-scale-depends-on-the-zero-stage" in text
