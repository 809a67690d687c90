"""What a job prints: at most 80 columns, plain text where it is no terminal, nothing that is not known."""

from __future__ import annotations

import io
from pathlib import Path

from made_up_results import results
from rich.console import Console

from ulysses_exp.report.terminal import Progress, summary

FOLDER = Path("/somewhere/outputs/run")


def printed(made: dict, how_to_open: str | None = "wandb leet outputs/run/wandb", encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    summary(made, FOLDER, Console(file=file, width=80), how_to_open)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_every_stage_is_shown_with_units():
    text = printed(results())
    for expected in (
        "tiny_llama  sp4-dp1-z3  ok", "853 k parameters", "5.5000 → 3.1134 in 20 steps", "234 k tokens/s",
        "69.9 ms median", "717 MiB, worst of 4 ranks", "128 calls, 48.0 MiB a step", "gradient norm 3.1e-08",
        "fits, 52.0 GiB of 77.0 GiB a rank", "longest      131,072 tokens", "41.0% at most",
        "largest difference of a logit: 2.4e-07",
        "bit-exact", "4.8e-07", "/somewhere/outputs/run", "wandb leet outputs/run/wandb",
    ):  # fmt: skip
        assert expected in text, expected
    assert "\x1b" not in text, "colours only on a terminal"
    assert max(map(len, text.splitlines())) <= 80


def test_bypass_and_sp_stand_side_by_side():
    lines = [line.split() for line in printed(results()).splitlines()]
    assert ["bypass", "3.2101", "24.8", "0", "9,000"] in lines
    assert ["sp", "3.2101", "24.8", "16", "28,800"] in lines


def test_plain_ascii_where_the_output_is():
    assert "5.5000 -> 3.1134" in printed(results(), encoding="ascii")


def test_failures_say_why():
    made = results()
    made.update(status="failed", error="stage reload: 1 of 4 cells")
    made["stages"]["parity"] = {"status": "failed", "reason": "rank 1: out of memory"}
    made["stages"]["reload"]["status"] = "failed"
    made["stages"]["reload"]["cells"][0].update(status="failed", reason="no such file", weights_bit_exact=None)
    text = printed(made, None)
    assert "failed: rank 1: out of memory" in text
    assert "sp1-dp1-z0 by huggingface: no such file" in text
    assert "stage reload: 1 of 4 cells" in text
    assert "W&B" not in text


def test_a_job_that_did_not_start_is_shown_too():
    text = printed({"status": "failed", "error": "rank 0: [Errno 12] out of [memory]", "stages": {}})
    assert "rank 0: [Errno 12] out of [memory]" in text, "brackets are no markup"


def test_texts_of_a_result_are_neither_markup_nor_terminal_sequences():
    made, hostile = results(), "\x1b[31m[/red]\x1b]0;title\x07 [bold]x\x9b2J\u202e"
    made.update(status="failed", error=hostile)
    made["model"] |= {"name": hostile, "attention": hostile}
    made["stages"]["eval"] = {"status": "failed", "reason": hostile}
    made["stages"]["parity"]["reference"] = hostile
    made["stages"]["plan"] |= {"settings": hostile, "assumptions": [hostile]}
    made["stages"]["reload"]["cells"][0] |= {"target": hostile, "status": "failed", "reason": hostile}
    text = printed(made)
    assert text.count("[/red] [bold]x") >= 7
    assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(text)
    console = Console(file=io.StringIO(), width=80)
    Progress(console).note(hostile)
    assert console.file.getvalue() == "[/red] [bold]x\n"


def test_a_loss_that_is_not_finite_is_told_with_its_step():
    made = results()
    made["stages"]["train"] |= {"loss": [5.0, None, float("nan")], "first_step": 10}
    assert "not finite at 2 of them, first at step 12" in printed(made)


def test_long_paths_are_not_broken():
    made, folder = results(), Path("/" + "a" * 100)
    console = Console(file=io.StringIO(), width=80)
    summary(made, folder, console, None)
    assert str(folder) in console.file.getvalue()


def test_progress_is_a_line_an_interval_where_there_is_no_terminal():
    console = Console(file=io.StringIO(), width=80)
    with Progress(console, headline="job 1/12") as progress:
        progress.start("train", 100)
        for step in range(1, 101):
            progress.step({"step": step, "train/loss": 5.0 - step / 100, "perf/tokens_per_second": 12345.0})
        progress.step({"step": 100, "eval/bypass/loss": 3.25})
        progress.start("reload", None)
        progress.note("reload [1/3]")
        progress.step({"step": 100, "reload/seconds": 1.5})  # nothing of it is shown
    assert console.file.getvalue().splitlines() == [
        "job 1/12", "train ...", "train 1/100 loss 4.9900  12,345 tokens/s",
        "train 100/100 loss 4.0000  12,345 tokens/s", "eval bypass loss 3.2500", "reload ...", "reload [1/3]",
    ]  # fmt: skip


def test_progress_of_a_resumed_run_counts_from_its_step():
    console = Console(file=io.StringIO(), width=80)
    with Progress(console) as progress:
        progress.start("train", 20)
        progress.step({"step": 11, "train/loss": 3.0})
    assert "train 11/20 loss 3.0000" in console.file.getvalue()


def test_progress_on_a_terminal_is_a_bar_below_the_headline():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Progress(console, headline="job 1/12") as progress:
        progress.start("train", 4)
        progress.step({"step": 4, "train/loss": 3.0, "memory/peak_bytes_max": 2**30})
        progress.note("a line that stays")
    text = console.file.getvalue()
    assert "job 1/12" in text
    assert "4/4" in text
    assert "loss 3.0000  1.00 GiB" in text
    assert "a line that stays" in text
