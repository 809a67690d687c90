"""Models as they are built, before DeepSpeed has them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
import yaml

from ulysses_exp.config import Config, ConfigError, ModelConfig, architecture
from ulysses_exp.model import build as models

ROOT = Path(__file__).resolve().parents[1]


def configured(name: str = "tiny_llama", precision: str = "fp32", **architecture: int) -> Config:
    config = Config()
    config.model = ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()))
    config.model.architecture |= architecture
    config.train.precision = precision
    return config


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma3", "tiny_qwen3"])
def test_ranks_differ_in_nothing_but_weights_to_be_sent(name):
    config = configured(name)
    first = models.build(config)
    state = torch.get_rng_state()
    other = models.build(config, rank=1)
    assert torch.equal(torch.get_rng_state(), state), "what is random later has to be the same on all ranks"
    shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (first, other)]
    assert shapes[0] == shapes[1]
    buffers = [dict(m.named_buffers()) for m in (first, other)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffers[0][n], buffers[1][n]) for n in buffers[0])


def test_other_ranks_take_no_memory_for_the_weights():
    config = configured(vocab_size=400_000)  # 400 MB of fp32
    before = _resident()
    model = models.build(config, rank=1)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size > 300e6
    assert _resident() - before < 0.1 * size


def test_what_depends_on_the_layout_is_refused_also_where_only_the_models_type_says_so(tmp_path):
    """GPT-2's configuration need not name its dropout of 0.1."""
    config = Config(stages=["train"])
    config.model = ModelConfig(
        name="tiny", architecture={"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4}
    )
    with pytest.raises(ConfigError, match=r"model\.architecture\.\w+_pdrop: 0\.1 draws other random numbers"):
        models.build(config)
    config.model.architecture |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    models.build(config)
    config = configured(output_router_logits=True)
    with pytest.raises(ConfigError, match="router"):
        models.build(config)


def test_the_architecture_overrides_a_folders(tmp_path):
    models.build(configured()).config.save_pretrained(tmp_path)
    config = Config()
    config.model = ModelConfig("hub", {"num_hidden_layers": 1}, name_or_path=str(tmp_path), pretrained=False)
    assert models.build(config).config.num_hidden_layers == 1
    assert architecture(config)["num_hidden_layers"] == 1


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_seed_gives_the_same_weights_on_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        weights = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            model = models.build(configured(hidden_size=256, vocab_size=4096))  # tensors large enough to be shared out
            weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(weights[0], other) for other in weights[1:])
