"""Mixers are replaced for one model and for as long as it is registered; recomputation knows its documents."""

from __future__ import annotations

import hybrid_models as tiny
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from test_mixer_numbers import TOLERANCE
from transformers import AutoConfig, AutoModelForCausalLM

from ulysses_exp.model.attention import ulysses
from ulysses_exp.model.mixers import binding


def _attributes(network: torch.nn.Module) -> list[dict[str, object]]:
    return [{k: v for k, v in vars(m).items() if not k.startswith("_") or "checkpointing" in k}
            for m in network.modules()]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_next", "recurrent_gemma"])
def test_everything_is_restored_and_other_models_are_left_alone(family: str) -> None:
    data, network, other = tiny.batch("packed"), tiny.model(family), tiny.model(family)
    network.gradient_checkpointing_enable()
    with torch.no_grad():
        expected, before = tiny.forward(other, data), _attributes(network)
        with pytest.raises(ZeroDivisionError), ulysses(network, sp=1, micro_batch_size=2) as handle:
            assert handle.mixers == len(binding.mixers(network)) == 2
            tiny.forward(network, data)
            assert _attributes(network) != before
            assert torch.equal(tiny.forward(other, data), expected)
            raise ZeroDivisionError
        assert _attributes(network) == before
        assert torch.equal(tiny.forward(network, data), expected)


def _checkpointed(rank: int, family: str, reentrant: bool, late: bool) -> float:
    """Two forwards before the first backward: each is recomputed with its own documents."""
    batches = [tiny.batch("packed"), tiny.batch("padded")]
    reference, network = tiny.model(family), tiny.model(family)
    sum(tiny.loss(tiny.alone(reference, data), data) for data in batches).backward()
    for switch_on_late in (False, True):
        if switch_on_late == late:
            network.gradient_checkpointing_enable({"use_reentrant": reentrant})
            network.enable_input_require_grads()
        if not switch_on_late:
            registered = ulysses(network, sp=2, micro_batch_size=2)
            handle = registered.__enter__()
    losses = [tiny.loss(tiny.forward(network, data, data.part(2, rank)), data, data.part(2, rank)) for data in batches]
    sum(losses).backward()
    mine = tiny.gradients(network)
    dist.all_reduce(mine, group=handle.mpu.get_sequence_parallel_group())
    registered.__exit__(None, None, None)
    return tiny.relative(mine, tiny.gradients(reference))


@pytest.mark.parametrize(("reentrant", "late"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("family", ["mamba2", "lfm2"])  # the one is given no position_ids
def test_a_recomputed_forward_has_its_own_documents(ranks: RankPool, family: str, reentrant: bool, late: bool) -> None:
    assert max(ranks.run(_checkpointed, family, reentrant, late)) <= TOLERANCE


def _evaluated(rank: int, family: str) -> tuple[bool, float]:
    """(plain batches are bit-equal to the unpatched model's, error of packed ones), whole on every rank at sp 4."""
    network = tiny.model(family).eval()
    plain, packed = tiny.batch("plain"), tiny.batch("packed")
    with torch.no_grad():
        expected, of_each = tiny.forward(network, plain), tiny.alone(network, packed)
        with ulysses(network, sp=4, micro_batch_size=2):
            equal = torch.equal(tiny.forward(network, plain), expected)
            return equal, tiny.relative(tiny.forward(network, packed), of_each)


@pytest.mark.parametrize("family", ["bamba", "lfm2", "mamba"])
def test_bypassed_eval_is_the_unpatched_model_with_documents_apart(ranks: RankPool, family: str) -> None:
    for equal, error in ranks.run(_evaluated, family):
        assert equal and error <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_next", "bamba", "jamba", "lfm2"])
def test_left_padding_has_the_unpatched_numbers(family: str) -> None:
    data, network = tiny.batch("padded"), tiny.model(family)
    with torch.no_grad():
        expected = tiny.forward(network, data)
        with ulysses(network, sp=1, micro_batch_size=2):
            found = tiny.forward(network, data)
    assert tiny.relative(found * data.real[..., None], expected * data.real[..., None]) <= TOLERANCE


def _generated(network: torch.nn.Module) -> torch.Tensor:
    prompt = tiny.batch("plain").input_ids[:, :20]
    return network.generate(prompt, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("family", ["bamba", "lfm2"])
def test_generate_keeps_its_cache(family: str) -> None:
    network = tiny.model(family).eval()
    expected = _generated(network)
    with ulysses(network, sp=1, micro_batch_size=2):
        assert torch.equal(_generated(network), expected)


def test_a_cache_of_packed_documents_is_refused() -> None:
    data, network = tiny.batch("packed"), tiny.model("bamba").eval()
    with (
        ulysses(network, sp=1, micro_batch_size=2),
        pytest.raises(ValueError, match="set use_cache=False"),
    ):
        network(input_ids=data.input_ids, position_ids=data.position_ids, use_cache=True)


def test_a_mixer_by_itself_is_refused() -> None:
    network = tiny.model("bamba")
    with (
        ulysses(network, sp=1, micro_batch_size=2),
        pytest.raises(RuntimeError, match="call the model, not its parts"),
    ):
        binding.mixers(network)[0](torch.zeros(1, 8, 32))


def _strange(rank: int) -> None:
    config = AutoConfig.for_model(
        "minimax", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, layer_types=["linear_attention", "full_attention"], num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="linear_attention, which Ulysses does not shard"):  # noqa: SIM117
        with ulysses(AutoModelForCausalLM.from_config(config), sp=4, micro_batch_size=2):
            pass


def test_what_is_not_known_stays_refused(ranks: RankPool) -> None:
    ranks.run(_strange)


def test_a_convolution_that_nobody_knows_is_refused() -> None:
    network = tiny.model("bamba")
    assert binding.why_not_served(network) is None
    network.model.layers[1].self_attn.smooth = torch.nn.Conv1d(32, 32, 3)
    assert "has a convolution, self_attn.smooth" in str(binding.why_not_served(network))
