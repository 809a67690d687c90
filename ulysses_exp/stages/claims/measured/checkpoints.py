"""C6, C8 and C9: what is in a checkpoint's files, and who opens it."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from ulysses_exp.launch import heartbeat
from ulysses_exp.rank.checkpoints import Fingerprint, fingerprint
from ulysses_exp.rank.checkpoints.digest import digest, to_hex
from ulysses_exp.rank.checkpoints.fingerprints import module_digests
from ulysses_exp.stages.claims.measured.subject import Subject

#: What a checkpoint held when it was saved, beside it, for those who open it
RECORD = "fingerprint.json"
EXPORTS = "exports"  # what is made of it for from_pretrained


def count(subject: Subject, folder: Path) -> dict[str, Any]:
    """Saves into `folder` and looks at what is there. Rank 0's figures count. Collective over the world."""
    now, module = fingerprint(subject.engine), module_digests(subject.engine)
    subject.save(folder)
    room = folder / EXPORTS
    ways = subject.exports(folder, room)
    found: dict[str, Any] = {"C6": {}, "C8": {}, "C9": {}}
    if subject.rank == 0:
        (folder / RECORD).write_text(json.dumps(now.as_dict()))
        inside = contents(folder)
        sizes = {
            n: p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for n, p in subject.model.named_parameters()
        }
        found["C6"] = _weights(sizes, module, now, inside)
        found["C9"] = {**_states(now, inside), **_consolidated(subject, folder, now)}
        found["C8"] = {"ways": {way: opened(place, module, now) for way, place in ways.items()}}
        shutil.rmtree(room, ignore_errors=True)
        shutil.rmtree(folder / "universal", ignore_errors=True)
    dist.barrier()
    return found


def contents(folder: Path) -> dict[str, tuple[int, set[str]]]:
    """(bytes, digests of the tensors in it) of every file of a checkpoint, by its place in `folder`."""
    found = {}
    for path in sorted(
        p for p in folder.rglob("*") if p.suffix in (".pt", ".safetensors") and "exports" not in p.parts
    ):
        heartbeat.beat()
        digests = {to_hex(digest(tensor.contiguous())) for tensor in _tensors_of(path)}
        found[str(path.relative_to(folder))] = path.stat().st_size, digests
    return found


def _tensors_of(path: Path) -> Iterator[Tensor]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield file.get_tensor(name)
    else:
        yield from _tensors_in(torch.load(path, map_location="cpu", weights_only=False))  # this task wrote it


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors_in(entry)


def _weights(sizes: dict[str, int], module: dict[str, str], now: Fingerprint, inside: Any) -> dict[str, Any]:
    """Of how many elements the parameters are there whole, in the files that hold any of them."""
    there = {
        name: [file for file, (_, digests) in inside.items() if {module[name], now.weights[name]} & digests]
        for name in sizes
    }
    return {
        "elements": sum(sizes.values()),
        "whole": sum(size for name, size in sizes.items() if there[name]),
        "missing": [name for name in sizes if not there[name]][:3],
        "files": {file: inside[file][0] for file in inside},
        "with_weights": sorted({file for files in there.values() for file in files}),
    }


def _states(now: Fingerprint, inside: Any) -> dict[str, Any]:
    """How many of the optimizer's states, one for each kind and parameter, are there whole."""
    everything = set().union(*(digests for _, digests in inside.values())) if inside else set()
    wanted = [value for states in now.optimizer.values() for value in states.values()]
    return {"states": len(wanted), "whole": sum(value in everything for value in wanted)}


def _consolidated(subject: Subject, folder: Path, now: Fingerprint) -> dict[str, Any]:
    """What DeepSpeed's converter to universal checkpoints makes of it: the states that are whole then, or its error."""
    if subject.side != "upstream":
        return {}
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(folder / "step"), output_folder=str(folder / "universal"), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    try:
        ds_to_universal.main(arguments)
    except Exception as error:
        return {"converter": "ds_to_universal", "converter_error": said(error)}
    found: set[str] = set()
    for path in (folder / "universal").rglob("*.pt"):
        heartbeat.beat()
        found |= {to_hex(digest(tensor.contiguous())) for tensor in _tensors_of(path)}
    wanted = [value for states in now.optimizer.values() for value in states.values()]
    return {"converter": "ds_to_universal", "converted": sum(value in found for value in wanted)}


def opened(place: Path | str, module: dict[str, str], now: Fingerprint) -> str:
    """`exact` where `from_pretrained` opens `place` with the trained weights bit for bit, else what happens instead."""
    if isinstance(place, str):
        return place
    heartbeat.beat()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, local_files_only=True, dtype="auto", output_loading_info=True
        )
    except Exception as error:
        return said(error)
    model, report = loaded
    if report["missing_keys"]:
        return f"{len(report['missing_keys'])} weights are missing, and drawn at random"
    wrong = 0
    for name, parameter in model.named_parameters():
        found = to_hex(digest(parameter.data))
        wrong += found not in (module.get(name), now.weights.get(name))
    return f"{wrong} weights differ" if wrong else "exact"


def said(error: BaseException) -> str:
    """Its first sentence, without the places of this machine."""
    text = re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text.split('. ')[0][:160].rstrip('.')}".rstrip(": ")
