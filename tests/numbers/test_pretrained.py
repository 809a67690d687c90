"""A pretrained folder that does not hold the model's weights, all of them and nothing else, is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ulysses_exp.config import Config, ConfigError, ModelConfig
from ulysses_exp.model import build as models


def folder(path: Path, change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None, **shape) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64} | shape
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def build(path: Path, *allowed: str) -> torch.nn.Module:
    config = Config()
    config.model = ModelConfig(name="hub", name_or_path=str(path), allow_missing=list(allowed))
    return models.build(config)


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(32, 16)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(8)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][3, 3] = float("nan")
    tensors["lm_head.weight"][1, 1] = float("inf")


@pytest.mark.parametrize(
    ("change", "message", "allowed"),
    [
        (lose, "2 of its weights are missing, first lm_head.weight", ["lm_head.weight", "*.up_proj.weight"]),
        (add, "1 of its weights belong to no part of the model, first model.layers.2", ["model.layers.2.*"]),
        (reshape, "1 of its weights have another shape than the model's, first model.norm.weight", ["*norm*"]),
        (spoil, "2 of its weights hold nan or infinity, first lm_head.weight", ["lm_head.*", "*embed*"]),
    ],
)
def test_what_is_not_the_models_is_refused(change, message, allowed, tmp_path):
    path = folder(tmp_path, change)
    with pytest.raises(ConfigError) as error:
        build(path)
    assert message in str(error.value) and "model.allow_missing=[" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    if len(allowed) > 1:
        with pytest.raises(ConfigError):
            build(path, allowed[0])
    build(path, *allowed)


def test_what_is_missing_on_purpose_is_no_fault(tmp_path):
    tied = build(folder(tmp_path / "tied", tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    build(folder(tmp_path / "old", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})))
