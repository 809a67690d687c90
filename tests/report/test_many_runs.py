"""A report of many runs: pictures that put them together, the best first, small and quick."""

from __future__ import annotations

import io
import math
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
import report_scale  # noqa: E402

from ulysses_exp.report import __main__ as report  # noqa: E402
from ulysses_exp.report import groups, pictures, runs  # noqa: E402
from ulysses_exp.report.page import page  # noqa: E402

COUNT = 200


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A sweep of 200 runs over layouts, lengths, learning rates and seeds, its report, and what was printed."""
    folder = tmp_path_factory.mktemp("many") / "sweep"
    report_scale.make(folder, COUNT)
    raw = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.write([folder], folder, Console(file=raw, width=80)) == COUNT
    yield folder, raw.getvalue()


@pytest.fixture(scope="module")
def found(written) -> list[runs.Run]:
    return runs.find([written[0]])


def test_every_run_has_a_row_of_the_page_and_few_have_one_elsewhere(written):
    folder, printed = written
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert html.count("\n<tr>") == COUNT
    assert len(html) < 600_000
    assert "150 more in report.html" in markdown
    assert "in report.html: 175 more" in printed
    assert len(markdown.splitlines()) < 150
    assert len(printed.splitlines()) < 60
    assert "100 runs" not in markdown.split("## ")[0]


def test_best_comes_first_and_is_told(written, found):
    folder, _ = written
    markdown = (folder / "report.md").read_text()
    losses = sorted(run.last_loss for run in found if run.status == "ok" and run.last_loss is not None)
    first = next(line for line in markdown.splitlines() if re.match(r"\| sp\d", line))
    assert f"| {losses[0]:.4f} |" in first
    assert f"- lowest loss: {losses[0]:.4f}, sp" in markdown
    assert "share of the variance of its ranks): lr (" in markdown
    head = re.search(r'aria-sort="(\w+)"><button type="button">(\w+)', (folder / "report.html").read_text())
    assert head is not None
    assert head.groups() == ("ascending", "loss")


def test_loss_picture_shows_the_median_of_each_rate(found):
    drawn = pictures.loss(found)
    assert drawn is not None
    assert f"({sum(bool(run.losses) for run in found)} runs)" in drawn.note
    assert "2 runs are not finite" in drawn.note
    axes = drawn.figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert [name for name in lines if name.startswith("lr")] == [f"lr {rate}" for rate in report_scale.RATES]
    members = [run.losses for run in found if run.setting("optim.lr") == 0.01 and run.losses]
    last = sorted(losses[50] for losses in members if 50 in losses and not math.isnan(losses[50]))
    middle = (last[len(last) // 2] + last[(len(last) - 1) // 2]) / 2
    assert lines["lr 0.01"].get_ydata()[-1] == pytest.approx(middle)
    agreement = drawn.figure.axes[-1]
    worst = max(agreement.get_lines()[1].get_ydata())
    assert 1e-9 < worst < 1e-6, "layouts of one setting agree to rounding, others are not compared"


def test_rows_of_a_picture_are_few_and_hold_every_run_once(found):
    measured = [run for run in found if run.figure("train.tokens_per_second")]
    rows = groups.rows(measured, lambda run: run.figure("train.tokens_per_second"))
    assert len(rows) <= groups.FEW
    assert sorted(map(id, (run for row in rows for run in row.runs))) == sorted(map(id, measured))
    assert {len({(run.layout, run.seq_len) for run in row.runs}) for row in rows} == {1}, "what decides the speed"
    assert all(row.label.endswith(f"({len(row.runs)})") for row in rows)


def test_a_number_with_many_values_is_cut_into_ranges(found):
    axis = groups.axis_of(found, "seed", most=3)
    assert axis is not None
    assert axis.values[0].startswith("seed 0 to ")
    assert len(axis.values) == 3
    parts = axis.split(found)
    assert [part.label for part in parts] == axis.values
    assert sum(len(part.runs) for part in parts) == COUNT


def test_what_went_wrong_is_told_once_for_all_alike(found):
    troubles = page("sweep", found).troubles
    assert len(troubles) == 6, troubles
    assert sum("and 9 more" in which for which, why in troubles if "does not divide" in why) == 1


@pytest.mark.long
def test_a_thousand_runs_take_ten_seconds_and_two_megabytes(tmp_path):
    seconds, _, size, _, drawn, said = report_scale.measure(1000, tmp_path / "runs")
    assert seconds < report_scale.TARGET_SECONDS
    assert size < report_scale.TARGET_BYTES
    assert drawn >= 8
    assert said == 0
