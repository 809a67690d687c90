"""What a checkpoint exports opens in a process that cannot import deepspeed, and says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from checkpoint_ranks import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_engine import Recipe, engine, steps
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ulysses_exp.layout import Layout
from ulysses_exp.rank import checkpoints

PROMPT = torch.arange(8)[None]


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"a": 0, "b": 1, "[UNK]": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")))


def train_and_save(folder: Path, layout: Layout, recipe: Recipe) -> list[int] | None:
    with engine(layout, recipe) as made:
        steps(made, layout, 0, 1)
        checkpoints.save(made, folder, layout=layout, step=1, state={}, tokenizer=_tokenizer())
        if layout.zero == 3:
            return None
        return made.module.eval().generate(PROMPT, max_new_tokens=6, do_sample=False)[0].tolist()


def check(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "ulysses_exp.rank.checkpoints.huggingface_check",
        str(folder),
        "--out",
        str(out),
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


CASES = {
    "fp32": ("sp2-dp1-z2", Recipe()),
    "bf16, tied, ZeRO 3": ("sp1-dp2-z3", Recipe(bf16=True, tied=True)),
    "two files": ("sp1-dp2-z1", Recipe(hidden=512, vocabulary=16384)),
}


@pytest.mark.parametrize("name", [pytest.param("fp32", marks=pytest.mark.long), *list(CASES)[1:]])
def test_opens_without_deepspeed(name: str, tmp_path: Path) -> None:
    layout, recipe = Layout.parse(CASES[name][0]), CASES[name][1]
    folder = tmp_path / "step1"
    generated = run(layout.world, train_and_save, folder, layout, recipe)[0]
    save_file({"input_ids": PROMPT, "labels": PROMPT.roll(-1)}, tmp_path / "batch.safetensors")
    done = check(folder, tmp_path / "out.json", "--batch", str(tmp_path / "batch.safetensors"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["weights_bit_exact"] is True
    assert result["dtype"] == ("bfloat16" if recipe.bf16 else "float32")

    export = folder / "huggingface"
    assert sorted(p.name for p in export.glob("*.safetensors")) == (
        [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] if name == "two files" else ["model.safetensors"]
    )
    model = AutoModelForCausalLM.from_pretrained(export, dtype="auto").eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(PROMPT).logits.float()[0], PROMPT.roll(-1)[0])
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-6)
    if generated is not None:
        assert model.generate(PROMPT, max_new_tokens=6, do_sample=False)[0].tolist() == generated
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == recipe.tied
    assert AutoTokenizer.from_pretrained(export)("b")["input_ids"] == [1]
    assert model.generation_config.eos_token_id is not None


def test_another_weight_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "step1"
    run(1, train_and_save, folder, Layout(1, 1, 0), Recipe())
    path = folder / "huggingface" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    assert check(folder, tmp_path / "out.json").returncode == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["weights_bit_exact"], result["different"]) == (False, ["model.norm.weight"])


def test_a_damaged_export_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "step1"
    run(1, train_and_save, folder, Layout(1, 1, 0), Recipe())
    path = folder / "huggingface" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    done = check(folder, tmp_path / "out.json")
    assert done.returncode == 1
    assert str(folder) in done.stderr.strip().splitlines()[-1]


def test_portable_files_hold_the_full_tensors_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "step1"
    run(2, train_and_save, folder, Layout(1, 2, 3), Recipe())
    weights = load_file(folder / "huggingface" / "model.safetensors")
    with safe_open(folder / "portable" / "weights-00001-of-00001.safetensors", "pt") as file:
        assert set(file.keys()) == set(weights)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in weights.items())
    with safe_open(folder / "portable" / "exp_avg_sq-00001-of-00001.safetensors", "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in weights} == {
            name: tuple(tensor.shape) for name, tensor in weights.items()
        }


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, int]] = {
    "gemma3_text": {**SMALL, "head_dim": 8},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**SMALL, "num_local_experts": 4},  # experts are one tensor in memory, many in published checkpoints
    "deepseek_v3": {
        **SMALL, "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },  # has a buffer that is trained without gradients
}  # fmt: skip


def export_family(folder: Path, family: str, zero: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": zero}}
    made, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    checkpoints.export_huggingface(made, folder)
    opened, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())
    made.destroy()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, tmp_path: Path) -> None:
    run(2, export_family, tmp_path / "export", family, 3)
