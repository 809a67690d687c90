"""Wrong configurations are refused before anything starts; right ones compose."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ulysses_exp.cli import main
from ulysses_exp.config import ConfigError, resolve
from ulysses_exp.config.composing import composed as compose
from ulysses_exp.config.paths import CONF

WRONG = [
    # (overrides, the key that the message names)
    (["sp.size=3", "sp.exchange=deepspeed"], "sp.size"),
    (["sp.size=3"], "train.seq_len"),
    (["sp.size=-2"], "sp.size"),
    (["sp.size=two"], "sp.size"),
    (["sp.size=16", "sp.exchange=deepspeed"], "sp.size"),
    (["sp.size=100"], "train.seq_len"),
    (["sp.attention=transformers", "sp.size=2"], "sp.attention"),
    (["dp.size=0"], "dp.size"),
    (["stages=[plan]", "sp.size=8", "dp.size=100000000", "train.global_batch_size=100000000"], "dp.size"),
    (["dp.size=3"], "train.global_batch_size"),
    (["model.architecture.num_key_value_heads=3", "sp.size=2"], "model.architecture.num_key_value_heads"),
    (
        [
            "model.architecture.num_attention_heads=6",
            "model.architecture.num_key_value_heads=2",
            "sp.size=4",
            "sp.exchange=deepspeed",
        ],
        "sp.size",
    ),
    (["train.seq_len=510", "sp.size=4"], "train.seq_len"),
    (["train.seq_len=1"], "train.seq_len"),
    (["train.seq_len=long"], "train.seq_len"),
    (["train.global_batch_size=3", "dp.size=2"], "train.global_batch_size"),
    (["train.micro_batch_size=3"], "train.global_batch_size"),
    (["train.global_batch_size=0"], "train.global_batch_size"),
    (["train.micro_batch_size=0"], "train.micro_batch_size"),
    (["train.steps=1.5"], "train.steps"),
    (["train.precision=fp64"], "train.precision"),
    (["train.stepz=3"], "train.steps"),
    (["trian.steps=3"], "train.steps"),
    (["+train.foo=1"], "train.foo"),
    (["+sp.sise=2"], "sp.sise"),
    (["zero.stage=4"], "zero.stage"),
    (["zero.stage=-1"], "zero.stage"),
    (["zero=stage4"], "zero"),
    (["zero=stage0", "zero.offload_optimizer=true"], "zero.offload_optimizer"),
    (["zero=stage2", "zero.offload_parameters=true"], "zero.offload_parameters"),
    (["train.log_every=0"], "train.log_every"),
    (["train.profile=true", "train.steps=2"], "train.profile"),
    (["zero.offload_optimizer=maybe"], "zero.offload_optimizer"),
    (["model=tiny_lama"], "model"),
    (["model=hub"], "model.name_or_path"),
    (["+model.architecture.output_router_logits=true"], "model.architecture.output_router_logits"),
    (["+model.architecture.attention_dropout=0.1"], "model.architecture.attention_dropout"),
    (["model.architecture.vocab_size=100"], "model.architecture.vocab_size"),
    (["data=txt"], "data"),
    (["data=hub"], "data.dataset"),
    (["data.padding=both"], "data.padding"),
    (["data.ignore_labels=1.0"], "data.ignore_labels"),
    (["data.mean_document=1"], "data.mean_document"),
    (["optim=adam"], "optim"),
    (["optim.schedule=step"], "optim.schedule"),
    (["optim=adamw", "optim.momentum=0.9"], "optim.momentum"),
    (["memory=everything"], "memory"),
    (["memory.offload_activations=true"], "memory.offload_activations"),
    (["memory.checkpointing=full"], "memory.checkpointing"),
    (["eval.mode=full"], "eval.mode"),
    (["stages=[eval,train]"], "stages"),
    (["stages=[eval]"], "checkpoint.source"),
    (["stages=[reload]"], "checkpoint.source"),
    (["checkpoint.source=/nowhere"], "checkpoint.source"),
    (["reload.layouts=[sp3-dp1-z0]"], "reload.layouts"),
    (["reload.layouts=[sp1-dp3-z0]"], "reload.layouts"),
    (["sp.attention=flash_attention_2", "device=cpu"], "sp.attention"),
    (["sp.attention=flex_attention", "device=cpu"], "sp.attention"),
    (["sp.exchange=nccl"], "sp.exchange"),
    (["tracker.mode=on"], "tracker.mode"),
    (["launch=ssh"], "launch"),
    (["launch.backend=mpi"], "launch.backend"),
    (["device=tpu"], "device"),
    (["experiment=none_such"], "experiment"),
    (["data=packed", "data.padding=left"], "data.padding"),
]


@pytest.mark.parametrize(("overrides", "key"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_wrong_configuration_is_refused(tmp_path: Path, monkeypatch, capsys, overrides, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it: taken back afterwards
    monkeypatch.setattr(sys, "argv", ["run.py", *overrides])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2, err
    assert key in err
    assert 1 <= len(err.strip().splitlines()) <= 2, err
    assert "Traceback" not in err and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "key", "seconds"),
    [
        (*WRONG[0], 2),
        (["tracker.project=a/b"], "tracker.project", 2),
        (["+model.architecture.num_hiden_layers=7"], "did you mean num_hidden_layers?", 5),
    ],
)
def test_a_refusal_comes_at_once(command, tmp_path: Path, overrides, key, seconds):
    """In processor time, which a machine busy with other work stretches less than the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done: subprocess.CompletedProcess[str] = command(*overrides, cwd=tmp_path, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and key in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < seconds


def composed(*overrides: str):
    return resolve(compose(list(overrides))[0])


GROUPS = ("data", "eval", "experiment", "launch", "memory", "model", "optim", "sp", "zero")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group, choice):
    extra = {
        ("model", "hub"): ["model.name_or_path=some/model"],
        ("data", "hub"): ["data.dataset=some/dataset"],
    }.get((group, choice), [])
    composed(f"{group}={choice}", *extra)


def test_stage_by_group_and_by_key_are_the_same():
    assert composed("zero=stage3") == composed("zero.stage=3")


def test_default_reload_targets_differ_from_the_trained_layout():
    config = composed("sp.size=2", "dp.size=1", "zero.stage=3")
    assert config.reload.layouts is not None and len(config.reload.layouts) == 3
    assert "sp2-dp1-z3" not in config.reload.layouts


def test_default_reload_targets_keep_to_what_the_batch_allows():
    config = composed("train.global_batch_size=1")
    assert all("dp1" in name for name in config.reload.layouts)


def test_layouts_of_more_ranks_than_are_attached(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert all("sp4" not in name for name in composed("launch=attached", "zero.stage=3").reload.layouts)
    with pytest.raises(ConfigError, match="sp4-dp1-z2 needs 4 ranks, 2 are attached"):
        composed("launch=attached", "sp.size=4")
    composed("launch=attached", "sp.size=8", "stages=[plan]")  # a plan is for machines that are not here


def test_gpus_that_are_not_there(monkeypatch):
    for place in ("machine", "rules", "layout_rules"):
        monkeypatch.setattr(f"ulysses_exp.config.{place}.accelerators", lambda: 2)
    with pytest.raises(ConfigError, match=r"sp\.size: .*needs 4 GPUs, 2 are present"):
        composed("sp.size=4", "device=cuda")
    composed("sp.size=4", "device=cuda", "launch.backend=gloo")  # where they are shared


def test_compiling_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        composed("train.compile=true", "device=cpu")


def test_the_reference_of_parity_is_one_process_without_savers_that_compute_otherwise():
    config = composed("sp.size=4", "zero.stage=2", "memory=alst", "train.compile=true", "device=cpu")
    reference = config.reference()
    assert reference.layout.name == "sp1-dp1-z0" and not reference.train.compile
    assert not (reference.memory.tiled_loss or reference.memory.tiled_mlp or reference.memory.loss_in_place)
    assert reference.memory.checkpointing == config.memory.checkpointing
    assert reference.train.global_batch_size == config.train.global_batch_size


def test_deepspeeds_own_keys():
    """Those that move bytes and time are passed on; those that would change the numbers are told where to be set."""
    zero = "+deepspeed.zero_optimization."
    found = composed(f"{zero}overlap_comm=true", f"{zero}sub_group_size=1000")
    assert found.deepspeed == {"zero_optimization": {"overlap_comm": True, "sub_group_size": 1000}}
    for override, said in (
        ("+deepspeed.gradient_clipping=1", r"\.gradient_clipping: is not for a job to set; set optim\.grad_clip"),
        ("+deepspeed.zero_optimization.stage=1", r"deepspeed\.zero_optimization\.stage: .*; set zero\.stage"),
        ("+deepspeed.zero_optimization.overlap_com=true", r"did you mean zero_optimization\.overlap_comm\?"),
        ("+deepspeed.zero_optimization.overlap_comm=3", r"overlap_comm: '3' is no value of it; set true or false"),
    ):
        with pytest.raises(ConfigError, match=said):
            composed(override)
