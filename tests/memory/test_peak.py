"""What each option is for: a lower peak of tensor memory in one forward and backward; and what it must leave alone."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import torch
from memory_ranks import new_model

from ulysses_exp.config import ConfigError, MemoryConfig
from ulysses_exp.config.tiles import AUTO, TILE, tiles_of
from ulysses_exp.model import memory
from ulysses_exp.model.memory import loss_in_place

LENGTH = 512
#: Shapes in which what an option saves is most of what there is.
WIDE_MLP = {"intermediate_size": 4096}
WIDE_VOCABULARY = {"vocab_size": 8192}


def batch() -> dict[str, Any]:
    tokens = torch.randint(256, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "shift_labels": tokens[:, 1:], "use_cache": False}


def peak_bytes(model: torch.nn.Module, backward: bool = True) -> int:
    """The running sum of the allocator's events, at its highest. The resident set would keep what malloc retains."""
    inputs = batch() | {"num_items_in_batch": LENGTH}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = model(**inputs).loss
        if backward:
            loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("option", "shape", "share"),
    [
        ("non_reentrant", {"num_hidden_layers": 8}, 0.5),
        ("reentrant", {"num_hidden_layers": 8}, 0.5),
        ("tiled_mlp", WIDE_MLP, 0.6),
        ("loss_in_place", WIDE_VOCABULARY, 0.6),
        ("tiled_loss", WIDE_VOCABULARY, 0.5),
        ("alst", {"num_hidden_layers": 8, **WIDE_MLP, **WIDE_VOCABULARY}, 0.4),
    ],
)
def test_peak_is_lower(monkeypatch, option: str, shape: dict[str, int], share: float) -> None:
    monkeypatch.setattr(loss_in_place, "AT_ONCE", 1 << 18)  # as little of these logits as of a large model's
    whole, saved = (peak_bytes(new_model("tiny_llama", each, **shape)) for each in ("none", option))
    assert saved <= share * whole, f"{saved / 2**20:.1f} of {whole / 2**20:.1f} MiB, {saved / whole:.2f}"


@pytest.mark.parametrize(("option", "share"), [("loss_in_place", 0.7), ("tiled_loss", 0.4)])
def test_an_evaluation_with_labels_holds_less_too(monkeypatch, option: str, share: float) -> None:
    monkeypatch.setattr(loss_in_place, "AT_ONCE", 1 << 18)
    models = [new_model("tiny_llama", each, **WIDE_VOCABULARY).eval() for each in ("none", option)]
    with torch.no_grad():
        losses = [model(**batch(), num_items_in_batch=1).loss for model in models]
        whole, saved = (peak_bytes(model, backward=False) for model in models)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert saved <= share * whole, f"{saved / 2**20:.1f} of {whole / 2**20:.1f} MiB, {saved / whole:.2f}"


def test_tiled_loss_holds_no_logits() -> None:
    model = new_model("tiny_llama", "tiled_loss")
    assert model(**batch()).logits is None
    assert model(input_ids=batch()["input_ids"]).logits.shape == (1, LENGTH, 256)


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "gemma3_text", "final_logit_softcapping": 0.5, "head_dim": 16},
        {"model_type": "granite", "logits_scaling": 3.0},
        {"model_type": "cohere", "logit_scale": 0.25},
    ],
    ids=lambda architecture: architecture["model_type"],
)
@pytest.mark.parametrize("saver", ["tiled_loss", "loss_in_place"])
def test_what_follows_the_head_is_kept(architecture: dict[str, Any], saver: str) -> None:
    outcomes = []
    for option in ("none", saver):
        model = new_model("tiny_llama", option, **architecture)
        loss = model(**batch()).loss
        (gradient,) = torch.autograd.grad(loss, model.get_input_embeddings().weight)
        outcomes.append((loss, gradient))
    (loss, gradient), (tiled_loss, tiled_gradient) = outcomes
    torch.testing.assert_close(tiled_loss, loss, rtol=1e-6, atol=0)
    assert (tiled_gradient - gradient).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("saver", ["tiled_loss", "loss_in_place"])
def test_labels_are_shifted_as_transformers_does(saver: str) -> None:
    inputs = batch()
    del inputs["shift_labels"]
    losses = [new_model("tiny_llama", option)(**inputs).loss for option in ("none", saver)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


def test_evaluation_is_left_alone() -> None:
    """Bit for bit, and the state dict has the same keys."""
    plain, saved = (new_model("tiny_llama", option).eval() for option in ("none", "alst"))
    with torch.no_grad():
        assert torch.equal(saved(batch()["input_ids"]).logits, plain(batch()["input_ids"]).logits)
    assert list(saved.state_dict()) == list(plain.state_dict())


def test_a_model_without_dense_mlps_is_refused() -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 2}
    with pytest.raises(ConfigError, match="tiled_mlp"):
        new_model("tiny_llama", "tiled_mlp", **experts)
    router = new_model("tiny_llama", "none", **experts, output_router_logits=True)
    with pytest.raises(ConfigError, match="tiled_loss"):
        memory.apply(router, MemoryConfig(name="tiled_loss", tiled_loss=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on CPU the layers' inputs are in host memory already")
def test_offload_frees_device_memory() -> None:
    peaks = []
    for option in ("non_reentrant", "offload"):
        model = new_model("tiny_llama", option, num_hidden_layers=8).cuda()
        inputs = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch().items()}
        model(**inputs)
        torch.cuda.reset_peak_memory_stats()
        loss = model(**inputs).loss
        peaks.append(torch.cuda.memory_allocated())
        loss.backward()
    assert peaks[1] <= peaks[0] - 6 * LENGTH * 128 * 4


def test_tiles_follow_the_length_where_none_are_given() -> None:
    assert [tiles_of(AUTO, n) for n in (16, 4 * TILE, 4 * TILE + 1, 462_500)] == [4, 4, 5, 113]
    assert tiles_of(7, 462_500) == 7
