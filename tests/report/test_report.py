"""The report of run and sweep folders: what it reads, what it writes, and what it shows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from html import escape
from pathlib import Path

import pytest
from made_up_results import results, write

from ulysses_exp.report import html as html_report
from ulysses_exp.report import pictures, runs, table, traits
from ulysses_exp.report.page import page

REPOSITORY = Path(__file__).parents[2]
PICTURES = ["throughput", "memory", "loss", "eval", "reload", "step_split", "parity", "plan", "plan_grid"]


def report(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ulysses_exp.report", *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80", "HOME": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layouts at two lengths, a failed job, a skipped one, one that was killed while it wrote a line."""
    folder = tmp_path_factory.mktemp("sweeps") / "ladder"
    for seq_len in (1024, 4096):
        for sp in (1, 2, 4):
            write(folder / f"sp.size={sp},train.seq_len={seq_len}", results(sp, 1, 3, seq_len), seq_len)
    failed = results(2, 2, 2)
    failed["status"], failed["error"] = "failed", "stage reload: 1 of 4 cells"
    failed["stages"]["reload"].update(status="failed", reason="1 of 4 cells")
    failed["stages"]["reload"]["cells"][2].update(
        status="failed",
        reason="AssertionError: len(self.ckpt_list) > 0",
        weights_bit_exact=None,
        optimizer_bit_exact=None,
    )
    write(folder / "failed", failed)
    skipped = {key: results(8, 1, 3)[key] for key in ("schema_version", "layout")}
    write(folder / "skipped", skipped | {"status": "skipped", "error": "sp.size: 8 KV heads", "stages": {}})
    killed = write(folder / "killed", results(1, 2, 1))
    (killed / "results.json").unlink()
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])
    (killed / ".hydra" / "config.yaml").write_text(
        "train: {seq_len: 4096}\ndata: {name: text}\nsp: {size: 1}\ndp: {size: 2}\nzero: {stage: 1}\n"
        "model: {name: tiny_llama}\n"
    )
    return folder


@pytest.fixture(scope="module")
def written(sweep: Path) -> tuple[Path, str]:
    """The sweep's report in its folder, and what was printed."""
    done = report(sweep, cwd=sweep.parent)
    assert done.returncode == 0, done.stderr
    return sweep, done.stdout


def test_every_picture_is_drawn_and_named_in_both_documents(written):
    folder, _ = written
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for name in PICTURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'<section id="{name}">' in html
        assert f"({name}.png)" in markdown


def test_html_needs_no_network_and_its_pictures_are_whole(written):
    folder, _ = written
    html = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!#)', html.replace("xlink:href", "href")), "something is loaded from elsewhere"
    assert "@import" not in html
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    drawn = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawn) == len(PICTURES)
    for svg in drawn:
        xml.etree.ElementTree.fromstring(svg)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "one picture would use another's clip path"
    assert len(html) < 500_000


def test_table_holds_every_run_and_its_figures(written):
    folder, printed = written
    rows = (folder / "report.html").read_text().split("<tbody>")[1].split("</tbody>")[0].count("<tr>")
    assert rows == 9
    markdown = (folder / "report.md").read_text()
    tokens_per_second = results(4, 1, 3, 1024)["stages"]["train"]["tokens_per_second"]
    (row,) = [line for line in markdown.splitlines() if line.startswith("| sp4-dp1-z3 | 1,024 |")]
    assert f"{tokens_per_second / 1000:.0f} k" in row
    assert "544 MiB" in row
    assert "sp4-dp1-z3" in printed
    assert max(map(len, printed.splitlines()[:12])) <= 80
    assert "unfinished" in printed


def test_what_is_not_ok_is_listed_with_its_reason(written):
    folder, printed = written
    for text in (printed, (folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert "len(self.ckpt_list)" in text
        assert "sp.size: 8 KV heads" in text
        assert "has not finished; 7 steps so far" in text


def test_killed_job_is_read_as_far_as_it_came(sweep):
    (killed,) = [run for run in runs.find([sweep]) if run.folder.name == "killed"]
    assert killed.status == "unfinished"
    assert killed.layout is not None
    assert killed.layout.name == "sp1-dp2-z1"
    assert list(killed.losses) == [1, 2, 3, 4, 5, 6, 7]


def test_same_runs_give_the_same_files(written, tmp_path):
    folder, _ = written
    done = report(folder, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("report.html", "report.md", "loss.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_one_run_alone(tmp_path):
    write(tmp_path / "run", results())
    done = report(tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {path.stem for path in (tmp_path / "run").glob("*.png")}
    assert drawn == set(PICTURES) - {"throughput", "memory", "plan_grid"}, "only what there is data for"


def test_several_paths_write_into_the_current_folder(tmp_path):
    for sp in (1, 2):
        made = results(sp)
        made["stages"] = {"train": made["stages"]["train"]}
        write(tmp_path / f"run{sp}", made)
    done = report("run1", "run2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "run1" / "report.html").exists()


@pytest.mark.parametrize(("path", "said"), [("nowhere", "no such folder"), ("empty", "no run below")])
def test_nothing_to_report(tmp_path, path, said):
    (tmp_path / "empty").mkdir()
    done = report(path, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_losses_are_compared_only_where_they_must_agree(tmp_path):
    write(tmp_path / "a", results(1), 1024)
    write(tmp_path / "b", results(2), 1024)
    write(tmp_path / "c", results(2), 4096)
    a, b, c = sorted(runs.find([tmp_path]), key=lambda run: run.folder.name)
    assert a.experiment == b.experiment
    assert a.experiment != c.experiment


def test_runs_are_told_apart_by_the_settings_in_which_they_differ(tmp_path):
    for rate in (0.1, 0.2):
        folder = write(tmp_path / f"optim.lr={rate}", results(2), 1024)
        with open(folder / ".hydra" / "config.yaml", "a") as config:
            config.write(f"optim: {{name: sgd, lr: {rate}}}\ntracker: {{mode: x{rate}}}\n")
    found = runs.find([tmp_path])
    assert traits.labels(found) == ["sp2-dp1-z3, lr 0.1", "sp2-dp1-z3, lr 0.2"]
    shown = table.table(found)
    assert [title for title in shown.titles if title in ("lr", "mode")] == ["lr"], "nothing that is not of the result"
    assert found[0].experiment != found[1].experiment


def test_another_choice_of_a_group_goes_by_its_name(tmp_path):
    for name, tiles in (("none", 0), ("alst", 4)):
        folder = write(tmp_path / name, results(2), 1024)
        with open(folder / ".hydra" / "config.yaml", "a") as config:
            config.write(f"memory: {{name: {name}, tiled_mlp: {tiles}}}\n")
    assert traits.labels(runs.find([tmp_path])) == ["sp2-dp1-z3, memory alst", "sp2-dp1-z3, memory none"]


def test_a_setting_that_differs_within_a_choice_is_named_beside_it(tmp_path):
    for name, padding in (("text", "none"), ("text", "left"), ("packed", "none")):
        folder = write(tmp_path / f"{name}-{padding}", results(2), 1024)
        (folder / ".hydra" / "config.yaml").write_text(
            f"train: {{seq_len: 1024}}\ndata: {{name: {name}, padding: {padding}, mean_document: {len(name)}}}\n"
        )
    assert [label.removeprefix("sp2-dp1-z3, ") for label in traits.labels(runs.find([tmp_path]))] == [
        "data packed, padding none", "data text, padding left", "data text, padding none",
    ]  # fmt: skip


def test_a_run_reached_by_two_paths_counts_once(tmp_path):
    write(tmp_path / "run", results(2))
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    assert len(runs.find([tmp_path / "run", tmp_path / "latest"])) == 1


def test_reload_picture_shows_the_worst_result_of_a_pair(tmp_path):
    made = results(2, 1, 3)
    cells = made["stages"]["reload"]["cells"]
    cells[:] = [
        cells[1],
        {**cells[1], "route": "universal", "status": "failed", "reason": "x", "weights_bit_exact": None},
    ]
    write(tmp_path / "run", made)
    drawn = pictures.reload(runs.find([tmp_path]))
    assert drawn is not None
    canvas = drawn.figure
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["failed"]
    (patch,) = canvas.axes[0].patches
    assert patch.get_hatch() == "///"


def test_reload_picture_counts_the_route_that_restores_the_optimizer(tmp_path):
    made = results(2, 1, 3)
    cells = made["stages"]["reload"]["cells"]
    cells[:] = [{**cells[0], "route": "portable", "optimizer_bit_exact": True, "seconds": 0.5}, cells[0]]
    write(tmp_path / "run", made)
    drawn = pictures.reload(runs.find([tmp_path]))
    assert drawn is not None
    canvas = drawn.figure
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["weights and optimizer bit-exact"]
    assert [text.get_text() for text in canvas.axes[0].texts] == ["portable 500 ms\nhuggingface 1.40 s"]


def test_ideal_memory_is_the_smallest_sp_divided(tmp_path):
    for sp in (1, 4):
        write(tmp_path / str(sp), results(sp))
    found = runs.find([tmp_path])
    drawn = pictures.memory(found)
    assert drawn is not None
    canvas = drawn.figure
    measured, ideal = canvas.axes[0].get_lines()
    peaks = [run.figure("train.peak_memory_bytes.max") / 2**30 for run in found]
    assert list(measured.get_ydata()) == peaks
    assert list(ideal.get_ydata()) == [peaks[0], peaks[0] / 4]


def test_memory_and_time_stand_side_by_side_at_one_sp_and_length(tmp_path):
    for stage in (0, 3):
        write(tmp_path / str(stage), results(2, 1, stage))
    found = runs.find([tmp_path])
    drawn = pictures.costs(found)
    assert drawn is not None
    canvas = drawn.figure
    for axes, key, unit in zip(
        canvas.axes, ("train.peak_memory_bytes.max", "train.step_time_s.median"), (2**20, 1), strict=True
    ):
        assert [bar.get_width() * unit for bar in axes.patches] == [run.figure(key) for run in found]
    write(tmp_path / "other", results(4))
    assert pictures.costs(runs.find([tmp_path])) is None


def test_longest_sequence_is_drawn_by_sp_and_kept_out_of_comparisons(tmp_path):
    for sp, tokens in ((1, 1000), (2, 1900)):
        made = results(sp)
        made["stages"] = {"train": made["stages"]["train"] | {"max_seq_len": tokens, "shortest_failed": tokens + 100}}
        del made["stages"]["train"]["step_split_s"]
        write(tmp_path / str(sp), made)
    found = runs.find([tmp_path])
    assert [run.seq_len for run in found] == [1000, 1900]
    assert [picture.name for picture in pictures.draw(found)] == ["longest"], "other lengths are other experiments"
    drawn = pictures.longest(found)
    assert drawn is not None
    canvas = drawn.figure
    measured, ideal = canvas.axes[0].get_lines()
    assert list(measured.get_ydata()) == [1000, 1900]
    assert list(ideal.get_ydata()) == [1000, 2000]
    assert "1,900" in [text for row in table.table(found).rows for _, text in row]


def test_columns_without_a_figure_are_left_out(tmp_path):
    made = results(2)
    made["stages"] = {"train": made["stages"]["train"]}
    write(tmp_path / "run", made)
    titles = table.table(runs.find([tmp_path])).titles
    assert "tokens/s" in titles
    assert not {"MFU", "parity", "reload", "planned memory"} & set(titles)


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_page_sorts_and_filters(written, tmp_path):
    folder, _ = written
    script = re.search(r"<script>(.*?)</script>", (folder / "report.html").read_text(), re.DOTALL)
    assert script is not None
    rows = [["sp1", "2", "ok"], ["sp2", "10", "ok"], ["sp4", "", "failed"], ["sp8", "1e-3", "ok"]]
    probe = f"""{script[1]}
    const rows = {json.dumps(rows)}.map(keys => ({{keys, text: keys.join(" ")}}));
    const titles = ["layout", "eval loss, sp", "status"];
    const names = found => found.map(row => row.keys[0]).join(" ");
    const sorted = (column, down) => names([...rows].sort((a, b) => order(a.keys[column], b.keys[column], down)));
    const found = query => names(rows.filter(matches(query, titles)));
    console.log(JSON.stringify([sorted(1, false), sorted(1, true), sorted(0, true), found("evalloss<3"),
      found("evallosssp>=10"), found("status=FAILED"), found("ok sp2"), found(""), found("loss<>"), found("nothing")]));
    """
    (tmp_path / "page.js").write_text(probe)
    done = subprocess.run(["node", str(tmp_path / "page.js")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        "sp8 sp1 sp2 sp4", "sp2 sp1 sp8 sp4", "sp8 sp4 sp2 sp1",  # numbers as numbers, what is missing last
        "sp1 sp8", "sp2", "sp4", "sp2", "sp1 sp2 sp4 sp8", "", "",
    ]  # fmt: skip


def test_a_row_has_the_command_that_starts_its_job_again(tmp_path):
    folder = write(tmp_path / "sweep" / "run", results(2))
    overrides = ["sp.size=2", "data.name=it's; rm -rf ~", "train.seq_len=4096"]
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    (run,) = runs.find([tmp_path])
    assert run.command is not None
    assert shlex.split(run.command) == ["python", "run.py", *overrides]
    html = html_report.document(page("sweep", [run]))
    assert f'title="{escape(run.command)}"' in html
