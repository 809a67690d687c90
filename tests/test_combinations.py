"""Combinations that cannot run are found without composing each, are those that Hydra's jobs would be, and are told
once a reason."""

import time

import pytest

from ulysses_exp import config as schema
from ulysses_exp.config import ConfigError
from ulysses_exp.config.composing import composed
from ulysses_exp.experiment import combinations
from ulysses_exp.experiment.combinations import impossible, jobs_of, reasons

CPU = ["device=cpu", "stages=[train]"]


def lost(*overrides):
    found = impossible([*CPU, *overrides], lambda job: composed(job)[0], schema.check)
    assert found is not None
    return found


def composed_anew(job):
    """Why Hydra's job cannot run, None where it can."""
    try:
        schema.resolve(composed(job)[0])
    except ConfigError as error:
        return str(error)
    return None


DEEPSPEED = "sp.exchange=deepspeed"  # which takes heads that divide


@pytest.mark.parametrize(
    "overrides",
    [
        ["sp.size=1,3", "sp.exchange=deepspeed", "zero=stage0,stage3", "zero.offload_optimizer=true,false"],
        [
            "model=tiny_llama,tiny_llama_mqa",
            "model.architecture.num_attention_heads=8,6",
            "sp.size=2,4",
            "sp.exchange=deepspeed,fused",
        ],
        ["stages=[train],[eval]", "reload.layouts=[sp1-dp1-z0],[sp3-dp1-z0]", "seed=1,-1"],
        ["+train.foo=1,2", "optim=adamw,sgd"],
        ["experiment=sp_scaling,eval_bypass", "hydra.sweeper.params=null", "sp.size=2,3", "train.seq_len=510,512"],
    ],
)
def test_they_are_what_composing_each_job_would_find(overrides):
    found = {job.number: str(job.error) for job in lost(*overrides)}
    each = enumerate(composed_anew(job) for job in jobs_of([*CPU, *overrides]))
    assert found == {number: error for number, error in each if error is not None}
    assert found


def test_a_thousand_take_seconds_and_a_reason_is_told_once():
    began = time.process_time()
    found = lost("sp.size=range(1,101)", "train.seq_len=512,1024", "train.global_batch_size=1,2,4,8,16", DEEPSPEED)
    assert time.process_time() - began < 10
    assert len(found) == 1000 - 4 * 2 * 5
    (line,) = reasons(found)
    assert line.startswith(
        "skipped 960 jobs: sp.size: 8 query heads do not divide over sp 3 in sp.exchange=deepspeed; set"
    )
    assert "(also sp.size=5, 6, 7, 9," in line and line.endswith(", ...)") and len(line) < 300


def test_a_job_knows_its_place_and_its_layout():
    (only,) = lost("sp.size=2,3", DEEPSPEED)
    assert only.number == 1 and "sp.size=3" in only.overrides
    assert only.config.sp.size == 3 and only.config.layout.name == "sp3-dp1-z2"


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=interval(0.1,0.2)"],
        ["checkpoint.source=a,b"],
        ["train.steps=${seed},2"],
        ["hydra.sweep.subdir=x", "seed=1,2"],
        ["hydra/sweeper=optuna", "seed=1,2"],
    ],
)
def test_where_it_cannot_be_told_hydra_is_to_say(overrides):
    assert impossible([*CPU, *overrides], lambda job: composed(job)[0], schema.check) is None


def test_hydra_makes_only_the_jobs_that_are_left():
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    before = BasicSweeper.split_arguments
    jobs = [["a=1"], ["a=2"], ["a=4"]]
    with combinations.only(jobs):
        assert BasicSweeper.split_arguments([], None) == [jobs]
        assert BasicSweeper.split_arguments([], 2) == [jobs[:2], jobs[2:]]
    assert BasicSweeper.split_arguments is before
