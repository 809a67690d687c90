"""The trained weights as `from_pretrained` opens them, without deepspeed or this project."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from ulysses_exp.rank.checkpoints.errors import written_together
from ulysses_exp.rank.checkpoints.homes import module_fragments
from ulysses_exp.rank.checkpoints.publish import sync_small
from ulysses_exp.rank.checkpoints.shards import Shard, plan
from ulysses_exp.rank.checkpoints.streaming import Files, write

INDEX = "model.safetensors.index.json"


def export_huggingface(engine: deepspeed.DeepSpeedEngine, folder: Path, tokenizer: Any = None) -> dict[str, str]:
    """Writes weights in the type they are trained in, configuration, generation configuration and `tokenizer`.

    Weights are streamed to as many safetensors files as there is work for the ranks, never gathered on one of them.
    Names are those of the model in memory; transformers reads these as well as those of the published checkpoints.
    Collective over the world.

    Returns:
        Digest of each parameter.

    Raises:
        CheckpointError: on all ranks, where one of them cannot write.
    """
    folder = Path(folder)
    files = Files(folder)
    found = write_huggingface(engine, files, folder, tokenizer)
    with written_together(folder):
        files.sync()
        if dist.get_rank() == 0:
            sync_small(folder)
    return found


def write_huggingface(engine: deepspeed.DeepSpeedEngine, files: Files, folder: Path, tokenizer: Any) -> dict[str, str]:
    """As `export_huggingface`, not yet synced to disk."""
    with written_together(folder):
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
    held = list(module_fragments(engine))
    shards = plan(held, [f.name for f in held], prefix="model")
    found = write(shards, held, files)
    with written_together(folder):
        if dist.get_rank() == 0:
            _write_index(shards, folder)
            write_configuration(engine, folder, tokenizer)
    return {name: value for (_, name), value in found.items()}


def _write_index(shards: list[Shard], folder: Path) -> None:
    tensors = [(tensor, shard) for shard in shards for tensor in shard.tensors]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in tensors)},
        "weight_map": {tensor.name: shard.file for tensor, shard in tensors},
    }
    if len(shards) == 1:
        (folder / shards[0].file).rename(folder / "model.safetensors")
    else:
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def write_configuration(engine: deepspeed.DeepSpeedEngine, folder: Path, tokenizer: Any) -> None:
    """config.json, generation_config.json and the tokenizer's files, as `save_pretrained` would write them."""
    model = engine.module
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
