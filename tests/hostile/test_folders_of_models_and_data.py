"""A model's or a data set's folder from somebody else: nothing in it runs, and nothing outside of it is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from received_run import composed

from ulysses_exp import config
from ulysses_exp.config import ConfigError

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 64,
         "architectures": ["LlamaForCausalLM"]}  # fmt: skip
CANARY = "CANARY of somebody else"
Change = Callable[[Path, Path], object]  # (the folder, a folder outside of it)


class Payload:
    def __init__(self, outside: Path):
        self.outside = outside

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.outside}/executed",)


def evil(outside: Path) -> str:
    return f"open({str(outside / 'executed')!r}, 'w')\nraise SystemExit('executed')\n"


def make_model(folder: Path) -> None:
    """In a rank: a tiny Llama as `save_pretrained` writes it, with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a"))).save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoint_ranks import run

    folder = tmp_path_factory.mktemp("models") / "model"
    run(1, make_model, folder)
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "text.txt").write_text(CANARY)
    return folder


def _json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def _moved(path: Path, outside: Path) -> None:
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def _only_pickled(folder: Path, outside: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(outside)))


def _sharded(folder: Path, outside: Path, name: str) -> None:
    (folder / "model.safetensors").rename(outside / "model.safetensors")
    _json(folder / "model.safetensors.index.json", metadata={}, weight_map={"model.norm.weight": name})


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


MODELS: dict[str, tuple[Change, str]] = {
    "pickled weights": (_only_pickled, "pytorch_model.bin"),
    "weights beside the folder": (
        lambda f, o: _sharded(f, o, "../outside/model.safetensors"),
        "weights that are not beside it",
    ),
    "weights anywhere": (lambda f, o: _sharded(f, o, f"{o}/model.safetensors"), "weights that are not beside it"),
    "weights by another name": (
        lambda f, o: _json(f / "config.json", transformers_weights="../outside/w.safetensors"),
        "transformers_weights",
    ),
    "pickle by another name": (
        lambda f, o: _json(f / "config.json", transformers_weights="x.bin"),
        "transformers_weights",
    ),
    "linked weights": (lambda f, o: _moved(f / "model.safetensors", o), "leads out"),
    "linked configuration": (lambda f, o: _moved(f / "config.json", o), "leads out"),
    "linked folder": (lambda f, o: (f / "more").symlink_to(o), "leads out"),
    "adapter of another model": (
        lambda f, o: _json(f / "adapter_config.json", base_model_name_or_path=str(o)),
        "adapter_config.json",
    ),
    "attention from a hub": (
        lambda f, o: _json(f / "config.json", attn_implementation="somebody/kernel"),
        "code on a hub",
    ),
    "attention from a hub, hidden": (
        lambda f, o: _json(f / "config.json", _attn_implementation="somebody/kernel:f"),
        "code on a hub",
    ),
    "configuration is a pipe": (lambda f, o: _pipe(f / "config.json"), "regular"),
    "tokenizer is a pipe": (lambda f, o: _pipe(f / "tokenizer.json"), "regular"),
    "configuration is deep": (lambda f, o: (f / "config.json").write_text("[" * 100_000), "config.json"),
    "configuration is a list": (lambda f, o: (f / "config.json").write_text("[]"), "config.json"),
}  # fmt: skip


def _refusal(*overrides: str) -> str:
    cfg = composed("device=cpu", "sp.size=1", "stages=[train]", *overrides)
    began = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        config.resolve(cfg)
    assert time.monotonic() - began < 5
    message = str(refused.value)
    assert "\n" not in message and CANARY not in message
    return message


@pytest.mark.parametrize("change", MODELS)
def test_a_models_folder_is_refused_before_anything_starts(
    change: str, model: Path, tmp_path: Path, outside: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    alter, words = MODELS[change]
    alter(folder, outside)
    message = _refusal("model=hub", f"model.name_or_path={folder}")
    assert message.startswith("model.name_or_path: ") and str(folder) in message and words in message, message
    assert not (outside / "executed").exists()


def test_a_snapshot_of_the_hub_may_link_to_its_own_blobs(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    config.resolve(composed("device=cpu", "sp.size=1", "stages=[train]", "model=hub", f"model.name_or_path={snapshot}"))


@pytest.mark.parametrize("key", ["cache_dir", "proxies", "token", "subfolder", "trust_remote_code", "_commit_hash"])
def test_no_setting_of_a_model_is_an_order_to_its_loader(key: str) -> None:
    assert _refusal(f"+model.architecture.{key}=x").startswith(f"model.architecture.{key}: ")


def open_them(folders: list[Path]) -> list[str]:
    """In a rank: what opening each as model and as tokenizer says."""
    from ulysses_exp.config import Config
    from ulysses_exp.model import build as models
    from ulysses_exp.rank.data.corpus import _tokenizer

    said = []
    for folder in folders:
        chosen = Config()
        chosen.model.name, chosen.model.name_or_path = "hub", str(folder)
        for opened in (models.build, _tokenizer):
            try:
                opened(chosen)
                said.append("opened")
            except ConfigError as error:
                said.append(str(error))
    return said


def test_what_transformers_refuses_or_only_reads(model: Path, tmp_path: Path, outside: Path) -> None:
    """Code in a folder stays text, whichever file points at it."""
    from checkpoint_ranks import run

    def changed(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(model, folder)
        for file in (
            "evil.py",
            "sitecustomize.py",
            "modeling_llama.py",
            "tokenization.py",
            "custom_generate/generate.py",
        ):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(evil(outside))
        return folder

    own_class, own_tokenizer, quantized, plain = map(changed, ("class", "tokenizer", "quantized", "plain"))
    _json(own_class / "config.json", model_type="evil",
          auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})  # fmt: skip
    _json(
        own_tokenizer / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
    )
    _json(quantized / "config.json", quantization_config={"quant_method": "fp8"})
    _json(plain / "config.json", _name_or_path="somebody/else", auto_map={"AutoModelForCausalLM": "evil.M"})
    _json(plain / "tokenizer_config.json", tokenizer_file=str(outside / "text.txt"))
    (plain / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    _json(plain / "generation_config.json", custom_generate="evil", trust_remote_code=True)
    (said,) = run(1, open_them, [own_class, own_tokenizer, quantized, plain])
    assert "custom code" in said[0] and "custom code" in said[3], said
    assert "quantized" in said[4]
    assert said[6:] == ["opened", "opened"], "what is plain data still opens"
    assert not (outside / "executed").exists()
    assert all("\n" not in line and CANARY not in line for line in said)


CARD = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\nA data set.\n"
DATA: dict[str, tuple[Change, str]] = {
    "card leads out": (lambda f, o: (f / "README.md").write_text(CARD.format("../outside/text.txt")), "README.md"),
    "card is absolute": (lambda f, o: (f / "README.md").write_text(CARD.format(o / "text.txt")), "README.md"),
    "card is on the network": (
        lambda f, o: (f / "README.md").write_text(CARD.format("https://example.com/x.txt")),
        "README.md",
    ),
    "card has a tag": (lambda f, o: (f / "README.md").write_text(CARD.format("!!python/name:os.system")), "README.md"),
    "settings lead out": (
        lambda f, o: (f / ".huggingface.yaml").write_text(CARD.format("../outside/*").split("---")[1]),
        ".huggingface.yaml",
    ),
    "saved state leads out": (
        lambda f, o: _json(f / "state.json", _data_files=[{"filename": "../outside/x.arrow"}]),
        "state.json",
    ),
    "splits lead out": (lambda f, o: _json(f / "dataset_dict.json", splits=["../outside"]), "dataset_dict.json"),
    "linked data": (lambda f, o: (f / "b.txt").symlink_to(o / "text.txt"), "leads out"),
    "linked folder": (lambda f, o: (f / "more").symlink_to(o), "leads out"),
    "data is a pipe": (lambda f, o: os.mkfifo(f / "b.txt"), "regular"),
}  # fmt: skip


@pytest.mark.parametrize("change", DATA)
def test_a_data_sets_folder_is_refused_before_anything_starts(change: str, tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("inside")
    alter, words = DATA[change]
    alter(folder, outside)
    message = _refusal("data=hub", f"data.dataset={folder}", "data.tokenizer=somebody/name")
    assert message.startswith("data.dataset: ") and words in message, message


def test_a_card_that_stays_inside_is_fine(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.format("[train/*.txt, a.txt]"))
    (tmp_path / "a.txt").write_text("inside")
    config.resolve(composed("device=cpu", "data=hub", f"data.dataset={tmp_path}", "data.tokenizer=somebody/name"))
