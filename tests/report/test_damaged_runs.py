"""Damaged runs beside good ones: the report is written, the good are whole, of the damaged it says what is wrong."""

from __future__ import annotations

import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_results import results, write
from rich.console import Console

from ulysses_exp.launch import run_folder
from ulysses_exp.report import __main__ as report
from ulysses_exp.report import runs
from ulysses_exp.report.files import MIB

GOOD = results(1, 1, 0)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage to the content of results.json; `change` gives another content, or None where it changed the one."""

    def damage(folder: Path) -> None:
        made = json.loads((folder / "results.json").read_text())
        other = change(made)
        (folder / "results.json").write_text(json.dumps(made if other is None else other))

    return damage


def content(name: str, raw: bytes) -> Callable[[Path], None]:
    """Damage that gives a file another content."""
    return lambda folder: (folder / name).write_bytes(raw) and None


def of_train(**values: Any) -> Callable[[Path], None]:
    return edited(lambda made: made["stages"]["train"].update(values))


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Damage that puts something else where a file was."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1024 * MIB)


def with_stage(name: str, value: Any) -> Callable[[Path], None]:
    return edited(lambda made: made["stages"].update({name: value}))


def nothing_is_finite(made: dict[str, Any]) -> dict[str, Any]:
    def spoil(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: spoil(value) for key, value in node.items()}
        if isinstance(node, list):
            return [spoil(value) for value in node]
        return math.nan if isinstance(node, float) else node

    return made | {"stages": spoil(made["stages"])}


CONFIG, METRICS = ".hydra/config.yaml", "metrics.jsonl"
#: What is done to a run, and what the report says of it
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "results-list": (content("results.json", b"[1, 2]"), "results.json: is a list, not a dictionary"),
    "results-null": (content("results.json", b"null"), "results.json: is null, not a dictionary"),
    "results-empty": (content("results.json", b""), "results.json is empty"),
    "results-truncated": (content("results.json", json.dumps(GOOD).encode()[:700]), "results.json is no JSON"),
    "results-binary": (content("results.json", bytes(range(128, 256))), "results.json is not UTF-8"),
    "results-nested": (content("results.json", b"[" * 200_000), "results.json is nested too deeply"),
    "results-dir": (replaced("results.json", Path.mkdir), "results.json is a folder"),
    "results-fifo": (replaced("results.json", os.mkfifo), "results.json is no file"),
    "results-loop": (replaced("results.json", lambda path: path.symlink_to(path)), "results.json cannot be opened"),
    "results-dangling": (replaced("results.json", lambda p: p.symlink_to("nowhere")), "results.json leads nowhere"),
    "results-device": (replaced("results.json", lambda p: p.symlink_to("/dev/zero")), "results.json is no file"),
    "results-1GB": (replaced("results.json", huge), "results.json is larger than 32 MiB"),
    "status-null": (edited(lambda made: made.update(status=None)), "status is null"),
    "status-other": (edited(lambda made: made.update(status="[/red]")), "status is '[/red]'"),
    "status-none": (edited(lambda made: {"stages": made["stages"]}), "says no status"),
    "stages-null": (edited(lambda made: made.update(stages=None)), "stages is null"),
    "model-null": (edited(lambda made: made.update(model=None)), "model is null"),
    "model-number": (edited(lambda made: made["model"].update(name=7)), "model.name is a number, not a text"),
    "train-null": (with_stage("train", None), "stages.train is null"),
    "train-text": (with_stage("train", "ok"), "stages.train is a text, not a dictionary"),
    "figure-text": (of_train(tokens_per_second="fast"), "stages.train.tokens_per_second is a text, not a number"),
    "figure-list": (of_train(step_time_s={"median": [1]}), "stages.train.step_time_s.median is a list"),
    "figure-dict": (of_train(mfu={}), "stages.train.mfu is a dictionary"),
    "figure-bool": (of_train(mfu=True), "stages.train.mfu is true or false"),
    "figure-negative": (of_train(tokens_per_second=-1), "stages.train.tokens_per_second is negative"),
    "figure-bigint": (of_train(tokens_per_second=10**400), "stages.train.tokens_per_second is larger than anything"),
    "figure-huge": (of_train(tokens_per_second=1e308), "stages.train.tokens_per_second is larger than anything"),
    "length-bigint": (of_train(max_seq_len=2**80), "stages.train.max_seq_len is no whole number"),
    "dict-number": (of_train(peak_memory_bytes=5), "stages.train.peak_memory_bytes is a number"),
    "split-text": (of_train(step_split_s={"compute": "x"}), "stages.train.step_split_s.compute is a text"),
    "split-many": (of_train(step_split_s={str(i): 1 for i in range(999)}), "step_split_s is a dictionary, not"),
    "loss-text": (of_train(loss=["x", 1.0]), "stages.train.loss holds a text at place 1"),
    "loss-number": (of_train(loss=3.0), "stages.train.loss is a number, not a list"),
    "first-step": (of_train(first_step="x"), "stages.train.first_step is a text"),
    "layout-null": (edited(lambda made: made.update(layout=None)), "layout is null"),
    "layout-text": (edited(lambda made: made["layout"].update(sp="four")), "layout.sp is a text"),
    "cells-text": (with_stage("reload", {"status": "ok", "cells": ["x"]}), "stages.reload.cells[0] is a text"),
    "cells-names": (with_stage("reload", {"status": "ok", "cells": [{"source": 1}]}), "cells[0].source is a number"),
    "eval-text": (with_stage("eval", {"status": "ok", "bypass": "x", "sp": 2}), "stages.eval.bypass is a text"),
    "plan-text": (with_stage("plan", {"status": "ok", "max_seq_len": "x"}), "stages.plan.max_seq_len is a text"),
    "started-text": (edited(lambda made: made.update(started="yesterday")), "started is a text, not a number"),
    "metrics-binary": (content(METRICS, b"\xa2\xff\n" * 3), "metrics.jsonl: line 1 is damaged (and 2 more)"),
    "metrics-nondict": (content(METRICS, b"7\n"), "metrics.jsonl: line 1 is damaged"),
    "metrics-step": (content(METRICS, b'{"step": "x", "train/loss": 1}\n'), "metrics.jsonl: line 1 is damaged"),
    "metrics-step-inf": (content(METRICS, b'{"step": 1e999, "train/loss": 1}\n'), "metrics.jsonl: line 1 is damaged"),
    "metrics-loss": (content(METRICS, b'{"step": 1, "train/loss": "x"}\n'), "metrics.jsonl: line 1 is damaged"),
    "metrics-nested": (content(METRICS, b"[" * 99_999 + b"\n"), "metrics.jsonl: line 1 is damaged"),
    "metrics-fifo": (replaced(METRICS, os.mkfifo), "metrics.jsonl is no file"),
    "metrics-1GB": (replaced(METRICS, huge), "metrics.jsonl is larger than 64 MiB"),
    "config-garbage": (content(CONFIG, b"\xff\xfe\x00"), ".hydra/config.yaml is not UTF-8"),
    "config-half": (content(CONFIG, b'train: {seq_len: 64}\ndata: "tex'), ".hydra/config.yaml is no YAML"),
    "config-list": (content(CONFIG, b"- 1\n- 2\n"), ".hydra/config.yaml holds no settings"),
    "config-nested": (content(CONFIG, b"a: " + b"[" * 99_999), ".hydra/config.yaml"),
    "config-dashes": (content(CONFIG, b"- " * 99_999), ".hydra/config.yaml has more values"),
    "config-aliases": (content(CONFIG, b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n"), "config.yaml has aliases"),
    "config-dir": (replaced(CONFIG, Path.mkdir), ".hydra/config.yaml is a folder"),
    "config-fifo": (replaced(CONFIG, os.mkfifo), ".hydra/config.yaml is no file"),
}
#: What may look odd and is no damage
ODD: dict[str, Callable[[Path], None]] = {
    "torn-last-line": lambda folder: (folder / METRICS).write_bytes((folder / METRICS).read_bytes()[:-9]) and None,
    "zeros-at-the-end": lambda folder: (folder / METRICS).open("ab").write(b"\0" * 4096) and None,
    "no-config": lambda folder: (folder / CONFIG).unlink(),
    "empty-config": content(CONFIG, b""),
    "model-is-a-text": content(CONFIG, b"model: x\ntrain: 5\n"),
    "cells-null": with_stage("reload", {"status": "ok", "cells": None}),
    "unknown-stage": with_stage("theirs", {"status": "ok", "C1": [object.__name__]}),
    "secret-in-an-interpolation": content(CONFIG, b"train: {seq_len: 4096}\ndata: {name: '${oc.env:HOME}'}\n"),
}


@pytest.mark.parametrize("name", [*DAMAGE, *ODD])
def test_a_run_is_read_as_far_as_it_is_sound(tmp_path, name):
    folder = write(tmp_path / "run", results(2))
    damage, said = DAMAGE[name] if name in DAMAGE else (ODD[name], "")
    damage(folder)
    (run,) = runs.find([tmp_path])
    if not said:
        assert (run.status, run.damaged) == ("ok", ())
        return
    assert run.status == "damaged"
    assert said in "; ".join(run.damaged)
    assert len("; ".join(run.damaged)) < 400
    if not name.startswith(("results", "stages", "train")):
        assert run.figure("parity.max_rel_loss_diff") == 1.4e-8, "what is sound is kept"


def test_runs_whose_settings_are_lost_are_not_compared(tmp_path):
    for name in ("a", "b"):
        DAMAGE["config-half"][0](write(tmp_path / name, results(2)))
    a, b = runs.find([tmp_path])
    assert a.experiment != b.experiment


def test_no_damage_takes_the_report_of_the_others_down(tmp_path):
    """All damaged runs at once, beside two good ones: every one has a row and its reason."""
    sweep = tmp_path / "sweep"
    for sp in (1, 4):
        write(sweep / f"good{sp}", results(sp))
    for name, (damage, _) in DAMAGE.items():
        damage(write(sweep / name, results(2)))
    html, markdown, printed = reported(sweep)
    assert html.count("\n<tr>") == len(DAMAGE) + 2
    assert f"{len(DAMAGE) + 2} runs" in markdown.splitlines()[2]
    for name, (_, said) in DAMAGE.items():
        if not said.startswith("metrics.jsonl: line"):  # several have the same
            assert said.split(" (")[0] in re.sub(r"\s", " ", html.replace("&#x27;", "'")), name
    assert "good" not in printed.split("damaged:")[1]


def test_what_is_not_finite_is_shown_and_is_no_damage(tmp_path):
    write(tmp_path / "sweep" / "good", results(4))
    for number, kind in enumerate((math.inf, -math.inf, math.nan, None)):
        diverged = results(2)
        diverged["stages"]["train"]["loss"][6 + number :] = [kind] * (14 - number)
        write(tmp_path / "sweep" / f"diverged{number}", diverged)
        once = results(1)
        once["stages"]["train"]["loss"][12 + number] = kind
        write(tmp_path / "sweep" / f"once{number}", once)
    evaluated = results(1)
    evaluated["stages"]["eval"]["sp"]["loss"] = math.inf
    write(tmp_path / "sweep" / "evaluated", evaluated)
    write(tmp_path / "sweep" / "nothing", nothing_is_finite(results(2)))
    html, markdown, printed = reported(tmp_path / "sweep")
    for text in (html, markdown, printed):
        for step in (7, 8, 9, 10):
            assert f"loss is not finite from step {step} on" in text
        for step in (13, 14, 15, 16):
            assert f"loss is not finite at 1 of 20 steps, first at step {step}" in text
        assert "loss is not finite from step 1 on" in text
        assert "not finite: stages.eval.sp.loss" in text
    assert "damaged" not in printed
    assert html.split("<tbody>")[1].split("</tbody>")[0].count("not finite") == 5


def test_a_running_job_is_called_running(tmp_path):
    made = results(2) | {"status": "running", "stages": {}}
    folder = tmp_path / "sweep" / "run"
    run_folder.lock(folder)
    write(folder, made)
    (folder / METRICS).write_text('{"step": 1, "train/loss": 5.0}\n{"step": 2, "train/loss": 4.5}\n')
    try:
        _, markdown, printed = reported(tmp_path / "sweep")
    finally:
        run_folder.release(folder)
    assert "1 run (1 running)" in printed
    assert "is running; 2 steps so far" in markdown
    _, markdown, printed = reported(tmp_path / "sweep")
    assert "1 run (1 interrupted)" in printed, "nobody writes there any more"
    assert "interrupted: the process that ran the job was ended" in markdown


def test_skipped_jobs_stand_together_by_reason(tmp_path):
    for sp in (3, 5, 7):
        made = {"schema_version": 1, "status": "skipped", "error": f"sp.size: {sp} does not divide 8 heads",
                "layout": results(sp)["layout"], "stages": {}}  # fmt: skip
        write(tmp_path / "sweep" / f"sp{sp}", made)
    write(tmp_path / "sweep" / "ok", results(2))
    _, markdown, _ = reported(tmp_path / "sweep")
    assert markdown.count("does not divide") == 1
    assert "- sp3-dp1-z3 and 2 more: skipped: sp.size: 3 does not divide 8 heads (and the like)" in markdown


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "picture": "<img src=x onerror=alert(1)>",
    "link": "[a link](javascript:alert(1))",
    "picture-link": "![x](http://example.invalid/x.png)",
    "cells": "a | b\n| c",
    "code": "`code` *strong* __under__ ~~no~~",
    "formula": r"$\frac{$ a $x_1$",
    "markup": "[/red][bold]x",
    "escapes": "\x1b[31mred\x1b]0;title\x07\x1bP1$r\x1b\\ \x9b2J\x08\x00bell\x07",
    "directions": "safe\u202egpj.exe",
    "half": "half \ud800 character",
    "glyphs": "名前 🚀",
    "long": "x" * 100_000,
}


def test_texts_are_shown_and_nothing_else(tmp_path):
    for sp, (name, text) in enumerate(HOSTILE.items(), 1):
        made = results(sp)
        made["model"]["name"] = text
        made["status"], made["error"] = "failed", text
        made["stages"]["eval"] = {"status": "failed", "reason": text}
        made["stages"]["reload"]["cells"][0].update(status="failed", reason=text, target=text, route=text)
        made["stages"]["parity"]["reference"] = text
        made["stages"]["train"]["step_split_s"] = {text: 1.0}
        folder = write(tmp_path / "sweep" / name, made)
        (folder / CONFIG).write_text(json.dumps({"train": {"seq_len": 64}, "data": {"name": text, text: 1}}))
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([f"data.name={text}", "sp.size=2"]))
    html, markdown, printed = reported(tmp_path / "sweep")
    for shown in (html, markdown, printed):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)
        assert len(shown) < 1_000_000
    assert "<script>alert" not in html
    assert "<img" not in html
    assert not re.search(r"<(script|img)", markdown)
    assert not re.search(r"(?<!\\)\[a link(?<!\\)\]", markdown)
    assert len(set(map(_cells, [line for line in markdown.splitlines() if line.startswith("|")]))) == 1
    for name in ("script", "markup", "formula", "glyphs", "code"):
        assert f"stage eval: {HOSTILE[name]}" in printed
    assert "stage eval: red" in printed


def _cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row))


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "sweep" / "run", results(2)).parent
    (folder / "report.html").mkdir()
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    assert report.main() == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("the report cannot be written: Is a directory")
    assert not list(folder.glob(".report*"))


def test_a_pipe_in_the_place_of_the_report_is_replaced_and_not_waited_for(tmp_path):
    folder = write(tmp_path / "sweep" / "run", results(2)).parent
    os.mkfifo(folder / "report.html")
    html, _, _ = reported(folder)
    assert html.startswith("<!doctype html>")


def reported(folder: Path) -> tuple[str, str, str]:
    """report.html, report.md and what is printed; a warning of matplotlib's is an error."""
    raw = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.write([folder], folder, Console(file=raw, width=400))
    return (folder / "report.html").read_text(), (folder / "report.md").read_text(), raw.getvalue()
