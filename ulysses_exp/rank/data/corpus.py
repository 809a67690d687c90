"""Token streams: a training and a held-out part of one text, as a flat array of token ids each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ulysses_exp.config import Config, ConfigError
from ulysses_exp.config.bounds import LEAST_TOKENS

HELD_OUT = 0.1  # the last tenth of a text is for evaluation


@dataclass(frozen=True)
class Corpus:
    """`train` and `eval`: int64 [tokens]; `sha256` of both, so that two runs can tell that they read the same text."""

    name: str
    train: np.ndarray
    eval: np.ndarray
    tokenizer: Any = None  # transformers', for the export; None where bytes are tokens

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.eval):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()[:16]


def python_reference() -> str:
    """The language reference that ships with CPython (`pydoc_data.topics`, PSF licence): 466 kB, no network.

    The text differs a little between Python versions; `Corpus.sha256` in results.json says which one it was.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def load_corpus(config: Config, vocab_size: int) -> Corpus:
    """The token streams that `config.data` names.

    Raises:
        ConfigError: the tokens do not fit the model's vocabulary, or the dataset cannot be read.
    """
    data = config.data
    if data.name == "synthetic":
        draw = np.random.default_rng([config.seed, 7])
        tokens = draw.integers(0, vocab_size, size=max(1 << 16, 4 * config.train.seq_len), dtype=np.int64)
        return _split("synthetic", tokens)
    tokenizer = _tokenizer(config)
    if data.name == "hub":
        return _hub(config, tokenizer)
    text = python_reference()
    if tokenizer is None:
        if vocab_size < 256:
            raise ConfigError("data", f"bytes need 256 tokens, the model has {vocab_size}", "set data.tokenizer")
        tokens = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    else:
        tokens = np.asarray(tokenizer(text)["input_ids"], dtype=np.int64)
    if tokens.max() >= vocab_size:
        raise ConfigError("data.tokenizer", f"has tokens beyond the model's {vocab_size}", "take the model's own: null")
    return _split("python-reference", tokens, tokenizer)


def _split(name: str, tokens: np.ndarray, tokenizer: Any = None) -> Corpus:
    cut = int(len(tokens) * (1 - HELD_OUT))
    return Corpus(name, tokens[:cut], tokens[cut:], tokenizer)


def _tokenizer(config: Config):
    """The tokenizer asked for, else the one in the model's folder; None where bytes are tokens."""
    path = config.data.tokenizer or config.model.name_or_path
    if path is None:
        return None
    local = Path(path).expanduser()
    if config.data.tokenizer is None and local.is_dir() and not any(local.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        key = "data.tokenizer" if config.data.tokenizer else "model.name_or_path"
        problem = f"no tokenizer in {path} ({str(error).splitlines()[0]})"
        raise ConfigError(key, problem, "set data.tokenizer to a folder or hub name") from error


def _hub(config: Config, tokenizer) -> Corpus:
    import datasets

    data = config.data
    if tokenizer is None:
        raise ConfigError("data.tokenizer", "data=hub needs a tokenizer", "set data.tokenizer to a folder or hub name")
    assert data.dataset is not None
    folder = Path(data.dataset).expanduser()

    def tokens(split: str) -> np.ndarray:
        try:
            if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
                table = datasets.load_from_disk(str(folder))
                table = table[split] if isinstance(table, datasets.DatasetDict) else table
            else:
                table = datasets.load_dataset(data.dataset, data.subset, split=split)
        except Exception as error:  # the package raises a dozen kinds: files, network, names, formats
            problem = f"cannot read {data.dataset} ({str(error).splitlines()[0]})"
            raise ConfigError("data.dataset", problem, "set a folder that datasets can read, or a hub name") from error
        if data.text_column not in table.column_names:
            problem = f"{data.dataset} has no column {data.text_column!r}"
            raise ConfigError("data.text_column", problem, f"choose from {', '.join(table.column_names)}")
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        parts = [np.asarray(tokenizer(text)["input_ids"] + end, dtype=np.int64) for text in table[data.text_column]]
        return np.concatenate([*parts, np.empty(0, np.int64)])

    text = tokens(data.split)
    if len(text) < LEAST_TOKENS:
        raise ConfigError("data.dataset", f"{data.dataset} holds {len(text)} tokens", f"set at least {LEAST_TOKENS}")
    if data.eval_split is None:
        return _split(data.dataset, text, tokenizer)
    return Corpus(data.dataset, text, tokens(data.eval_split), tokenizer)
