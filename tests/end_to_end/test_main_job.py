"""What a user holds in hand after `python run.py`."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import only_run
from listeners import LOOPBACK, Listeners

QUICK = ["train.steps=7", "train.profile=true", "train.seq_len=128", "device=cpu"]


SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_FAKEFAKEFAKE",
           "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIfake", "MY_PASSWORD": "correct-horse-fake"}  # fmt: skip

#: Modules that the current folder offers in the place of those that a job imports.
TRAPS = ("json.py", "signal.py", "torch/__init__.py", "multiprocessing/__init__.py", "transformers/__init__.py",
         "sitecustomize.py", "ulysses_exp/__init__.py", "hydra_plugins/evil/__init__.py")  # fmt: skip


@pytest.fixture(scope="module")
def job(command, tmp_path_factory) -> tuple[Path, str]:
    """(run folder, what the terminal showed) of the main job, small, in a folder that is not to be trusted."""
    folder = tmp_path_factory.mktemp("job")
    for trap in TRAPS:
        (folder / trap).parent.mkdir(parents=True, exist_ok=True)
        (folder / trap).write_text(f"open({str(folder / 'executed')!r}, 'a').write(__name__)\n")
    before = {p.name for p in folder.iterdir()}
    for name, value in SECRETS.items():
        os.environ[name] = value
    listening.clear()
    try:
        with Listeners(listening):
            done = command("sp.size=4", "zero.stage=3", *QUICK, cwd=folder, keep=("WANDB_API_KEY",))
    finally:
        for name in SECRETS:
            del os.environ[name]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in folder.iterdir()} - before == {"outputs"}, "nothing else is left, no trap has been run"
    return only_run(folder), done.stdout


listening: set[tuple[str, str]] = set()  # (program, address) seen while the job ran


def test_nothing_listens_beyond_this_machine(job):
    assert any("python" in program for program, _ in listening), "ranks do listen on loopback"
    assert {address for _, address in listening} <= LOOPBACK, listening


def test_no_secret_of_the_environment_is_written(job):
    for path in job[0].rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name, value in SECRETS.items() if value.encode() in content], path
    assert not [name for name, value in SECRETS.items() if value in job[1]]


@pytest.fixture(scope="module")
def results(job) -> dict:
    return json.loads((job[0] / "results.json").read_text())


def test_every_stage_is_ok(results):
    assert results["status"] == "ok" and results["error"] is None
    assert {name: stage["status"] for name, stage in results["stages"].items()} == dict.fromkeys(
        ("train", "eval", "reload"), "ok"
    )


def test_training_learns_and_measures(results):
    train = results["stages"]["train"]
    assert train["loss"][-1] < train["loss"][0] < math.log(256) * 1.1
    assert train["weights_identical_across_ranks"] is True
    assert len(train["peak_memory_bytes"]["per_rank"]) == 4
    split = train["step_split_s"]
    assert set(split) == {"compute", "exchange", "zero", "input"} and all(part > 0 for part in split.values())
    assert train["unmeasured_steps"] == 6  # three to warm up, three under the profiler
    assert train["tokens_per_step"] == 4 * 128  # each token once, not once per rank
    # 4 layers, 4 micro steps; the fused exchange makes two all-to-alls a layer in each direction
    assert train["communication"]["all_to_all_calls_per_step"] == 4 * 4 * 4


def test_bypassed_evaluation_communicates_nothing_and_agrees(results):
    evaluation = results["stages"]["eval"]
    assert evaluation["bypass"]["all_to_all_calls"] == 0
    assert evaluation["sp"]["all_to_all_calls"] > 0
    assert abs(evaluation["bypass"]["loss"] - evaluation["sp"]["loss"]) < 1e-5
    assert evaluation["max_abs_logit_diff"] < 1e-5


def test_reloads_are_bit_exact_and_go_on(results):
    cells = results["stages"]["reload"]["cells"]
    assert len(cells) == 4 and cells[-1]["route"] == "huggingface"
    for cell in cells:
        assert cell["status"] == "ok" and cell["weights_bit_exact"] is True
    for cell in cells[:-1]:
        assert cell["optimizer_bit_exact"] is True
        assert cell["continuation_max_abs_loss_diff"] < 1e-5


def test_bypassed_loss_is_that_of_transformers_alone(job, results):
    """The exported model in this process, unpatched, on the same held-out sequences."""
    import torch
    import torch.nn.functional as F
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM

    from ulysses_exp.config import Config
    from ulysses_exp.rank.data import load_corpus
    from ulysses_exp.rank.data.sequences import draw

    saved = OmegaConf.load(job[0] / ".hydra" / "config.yaml")
    config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))
    corpus = load_corpus(config, 256)
    model = AutoModelForCausalLM.from_pretrained(job[0] / "checkpoints/step7/huggingface").eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(config.eval.sequences):
            sequence = draw(config, corpus, "eval", index)
            logits = model(torch.from_numpy(sequence.input_ids)[None]).logits[0]
            total += float(F.cross_entropy(logits, torch.from_numpy(sequence.labels), reduction="sum"))
            count += len(sequence.labels)
    assert total / count == pytest.approx(results["stages"]["eval"]["bypass"]["loss"], abs=1e-5)


def test_the_terminal_shows_the_summary(job):
    text = job[1]
    for part in ("sp4-dp1-z3", "tokens/s", "bypass", "bit-exact", "results", "wandb"):
        assert part in text


def test_the_offline_run_is_readable_by_wandb(job):
    (run,) = (job[0] / "wandb").glob("offline-run-*")
    wandb = shutil.which("wandb", path=str(Path(sys.executable).parent))
    assert wandb is not None
    done = subprocess.run([wandb, "leet", "inspect", "--json", str(run)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "perf/tokens_per_second",
                 "perf/tokens_per_second_per_rank", "perf/step_time_s", "perf/tflops_per_rank", "perf/mfu", "perf/hfu",
                 "memory/peak_bytes_max",
                 "memory/peak_bytes_mean", "comm/all_to_all_bytes", "eval/bypass/loss", "eval/sp/loss",
                 "reload/seconds"):  # fmt: skip
        assert name in done.stdout, name
