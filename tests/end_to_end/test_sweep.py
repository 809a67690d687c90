"""Multirun: all jobs run, wrong combinations are skipped, done jobs are not run again."""

import json

QUICK = ["stages=[train]", "train.steps=2", "train.seq_len=32", "train.unmeasured_steps=0", "device=cpu",
         "tracker.mode=disabled"]  # fmt: skip


def statuses(folder):
    return {
        p.parent.name: json.loads(p.read_text())["status"]
        for p in sorted(folder.glob("outputs/sweeps/names/*/results.json"))
    }


def test_a_sweep_resumes(command, tmp_path):
    sweep = ["-m", "sweep.name=names", "sp.size=1,2,3", *QUICK]
    first = command(*sweep, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    found = statuses(tmp_path)
    assert sorted(found.values()) == ["ok", "ok", "skipped"]
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("outputs/sweeps/names/*/metrics.jsonl")}

    again = command(*sweep, cwd=tmp_path)
    assert again.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps  # nothing trained again

    changed = command(*[o.replace("train.steps=2", "train.steps=3") for o in sweep], cwd=tmp_path)
    assert changed.returncode == 0
    lengths = {len(p.read_text().splitlines()) for p in tmp_path.glob("outputs/sweeps/names/*/metrics.jsonl")}
    assert 3 in lengths


def test_a_failing_job_does_not_end_the_sweep(command, tmp_path):
    broken = tmp_path / "no_model"
    broken.mkdir()
    done = command("-m", "sweep.name=names", f"model.name_or_path={broken},null", "sp.size=2", *QUICK, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert sorted(statuses(tmp_path).values()) == ["failed", "ok"]
    assert "no model in" in done.stdout
