"""The search for the longest sequence that trains, and the memory limit that it runs into."""

import json
import multiprocessing

import pytest
import torch

from ulysses_exp.config import ConfigError, resolve
from ulysses_exp.config.composing import composed as compose
from ulysses_exp.launch import RankFailure
from ulysses_exp.rank.memory_limit import held, limited
from ulysses_exp.stages.train.longest import find, search

MIB = 2**20
SEARCH = ["longest.search=true", "longest.memory_gib=1", "stages=[train]", "sp.size=2", "device=cpu"]


def composed(*overrides):
    return resolve(compose([*SEARCH, *overrides])[0])


@pytest.mark.parametrize("limit", [16, 17, 500, 512, 1000, 4096, 100_000])
@pytest.mark.parametrize("first", [16, 1000, 5000])
@pytest.mark.parametrize("factor", [1.1, 2.0])
def test_search_closes_in_on_the_limit(limit, first, factor):
    tried = []

    def trains(tokens):
        tried.append(tokens)
        return tokens <= limit

    longest, shortest = search(trains, first, step=16, within=0.05, factor=factor)
    assert longest <= limit < shortest
    assert longest % 16 == shortest % 16 == 0
    assert shortest - longest <= max(16, 0.05 * shortest)
    assert len(tried) == len(set(tried)) <= 20, "no length is tried twice"
    assert {longest, shortest} <= set(tried)


@pytest.mark.parametrize("limit", [9400, 10_000, 10_600])
def test_a_good_guess_saves_tries(limit):
    tried = []

    def trains(tokens):
        tried.append(tokens)
        return tokens <= limit

    search(trains, 10_000, step=16, within=0.05, factor=1.1)
    assert len(tried) <= 4


def test_nothing_trains():
    assert search(lambda tokens: False, 1000, step=16, within=0.05) == (0, 16)


def test_a_tensor_beyond_the_limit_is_refused_and_said_to_be_memory():
    """In a process of its own, as a rank is: this one's heap may hold freed memory that a tensor fits into."""
    rank = multiprocessing.get_context("spawn").Process(target=beyond_the_limit)
    rank.start()
    rank.join()
    assert rank.exitcode == 0


def beyond_the_limit():
    with limited(torch.device("cpu"), 64 * MIB, held()):
        kept = torch.zeros(24 * MIB, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.zeros(64 * MIB, dtype=torch.uint8)
    torch.zeros(64 * MIB, dtype=torch.uint8)
    assert kept.sum() == 0
    with pytest.raises(MemoryError, match="model and engine take"), limited(torch.device("cpu"), 1, held() - MIB):
        pass


def test_another_failure_is_not_taken_for_memory(tmp_path):
    found = {}

    def broken(task):
        raise RankFailure(1, "ValueError: no corpus")

    with pytest.raises(RankFailure, match="no corpus"):
        find(composed("longest.plan=false"), tmp_path, broken, found, note=lambda text: None)
    assert [entry["seq_len"] for entry in found["tries"]] == [512]


def test_a_killed_rank_counts_as_out_of_memory_where_its_thread_says_so(tmp_path):
    from ulysses_exp.launch.failure import first_failure

    (tmp_path / "rank1.err").write_text("terminate called after throwing an instance of 'std::bad_alloc'\n")
    assert first_failure(tmp_path, {0: None, 1: -6}).out_of_memory
    assert not first_failure(tmp_path, {0: -6, 1: None}).out_of_memory


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("longest.memory_gib=null", "longest.memory_gib"),
        ("longest.memory_gib=0", "longest.memory_gib"),
        ("longest.within=1", "longest.within"),
        ("longest.steps=0", "longest.steps"),
        ("launch=attached", "longest.search"),
    ],
)
def test_a_search_that_cannot_run_is_refused(override, key):
    with pytest.raises(ConfigError) as error:
        composed(override)
    assert error.value.key == key


@pytest.mark.long
def test_two_ranks_train_longer_sequences_than_one(command, tmp_path):
    done = command(
        "experiment=max_seq_len", "sp.size=1,2", "zero.stage=0", "longest.memory_gib=0.0625", "longest.within=0.3",
        "longest.plan=false", "train.seq_len=1024", "tracker.mode=disabled", "device=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for path in tmp_path.glob("outputs/sweeps/max_seq_len/*/results.json"):
        results = json.loads(path.read_text())
        train = results["stages"]["train"]
        found[results["layout"]["sp"]] = train["max_seq_len"]
        verdicts = {entry["seq_len"]: entry for entry in train["tries"]}
        assert verdicts[train["max_seq_len"]]["trains"] and not verdicts[train["shortest_failed"]]["trains"]
        assert all(("out of memory" in (entry["reason"] or "")) != entry["trains"] for entry in verdicts.values())
        assert train["shortest_failed"] <= 1.5 * train["max_seq_len"]
        assert train["tokens_per_step"] == train["max_seq_len"], "the job goes on at the length that was found"
    assert found[2] > found[1], "usually 1.6 times as long; what malloc keeps differs from run to run"
