"""Opens a checkpoint as somebody would who has transformers alone.

`python -m ulysses_exp.rank.checkpoints.huggingface_check FOLDER --out RESULT.json`: a fresh process in which deepspeed
cannot be imported. Compares the weights that `from_pretrained` loads with the digests that were taken of the trained
model, bit for bit, compares what the model computes with what was recorded, and computes the loss of a batch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulysses_exp.launch import strict_json


def check(
    folder: Path, digests: dict[str, str] | None, batch: Path | None, recorded: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The findings as a part of results.json's reload cell.

    Args:
        folder: what `from_pretrained` opens.
        digests: of each parameter, in the type it was trained in; None compares nothing.
        batch: safetensors file with `input_ids` and `labels` [batch, tokens]; labels are the next tokens already, as in
            ulysses_exp.rank.data; `position_ids` where they matter.
        recorded: `Manifest.function` of the checkpoint that `folder` lies in; None compares nothing.

    Returns:
        weights_bit_exact, seconds and bytes of loading, dtype, the batch's mean `loss` over its targets, and with
        `recorded` what `_compare_function` finds.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from ulysses_exp.config.received.foreign import check_model
    from ulysses_exp.rank.checkpoints.digest import digest, to_hex

    check_model(folder, weights=True)
    began = time.perf_counter()
    opened: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        dtype="auto",
        output_loading_info=True,
    )
    model, report = opened
    result: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_bit_exact": None,
    }
    if digests is not None:
        loaded = dict(model.named_parameters()) | dict(model.named_buffers())
        wrong = sorted(n for n, d in digests.items() if n not in loaded or to_hex(digest(loaded[n].data)) != d)
        wrong += sorted(str(key) for key in report["missing_keys"])
        result["weights_bit_exact"] = not wrong
        if wrong:
            result["different"] = wrong[:5]
    if recorded is not None:
        result |= _compare_function(folder, model, recorded)
    if batch is not None:
        tensors = load_file(batch)
        model.eval()
        with torch.no_grad():
            logits = model(tensors["input_ids"], position_ids=tensors.get("position_ids"), use_cache=False).logits
        labels = tensors["labels"].flatten()
        result["loss"] = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels).item()
    return result


def _compare_function(folder: Path, model: Any, recorded: dict[str, Any]) -> dict[str, Any]:
    """Holds what `model` computes against what the trained one did.

    Returns:
        `logits`: ok, not recorded, or what is wrong with them; `logits_max_rel_diff`, of the largest logit; and
        `config_changed`, the keys of config.json that are not as they were saved.
    """
    import torch

    from ulysses_exp.rank.checkpoints import function

    found: dict[str, Any] = {"logits": "not recorded"}
    if "config" in recorded:
        now = json.loads((folder / "config.json").read_text())
        found["config_changed"] = function.config_changes(recorded["config"], now)
    if "logits_sha256" not in recorded:
        return found
    try:
        then = function.read(folder.parent, recorded["logits_sha256"])
    except ValueError as error:
        return found | {"logits": str(error)}
    ids = function.token_ids(model.config.get_text_config().vocab_size, len(then["logsumexp"]))
    model.eval()
    with torch.no_grad():
        logits = model(ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits[0]
    apart = function.difference(then, function.record(logits))
    found["logits_max_rel_diff"] = apart
    tolerance = function.TOLERANCE.get(str(model.dtype).removeprefix("torch."), 0.0)
    found["logits"] = (
        "ok" if apart <= tolerance else f"the logits differ by {apart:.1e} of the largest from those at the save"
    )
    return found


def import_what_loading_needs(folder: Path) -> None:
    """Imports transformers and the model's classes, so that the time of loading is that of loading."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ulysses_exp.config.received.foreign import check_model
    from ulysses_exp.config.received.reading import Refused

    try:
        check_model(_exported(folder), weights=True)
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(_exported(folder), local_files_only=True, trust_remote_code=False)
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, Refused):
        return  # loading says what is wrong


def _exported(folder: Path) -> Path:
    """What `from_pretrained` opens of a checkpoint."""
    return folder / "huggingface" if (folder / "manifest.json").exists() else folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkpoint, or a folder for from_pretrained")
    parser.add_argument("--batch", type=Path, help="safetensors file: input_ids, labels (the next tokens)")
    parser.add_argument(
        "--fingerprint", type=Path, help="JSON, parameter -> digest; default: the checkpoint's manifest"
    )
    parser.add_argument("--out", type=Path, required=True, help="where the findings go, as JSON")
    parser.add_argument("--wait", action="store_true", help="import first, begin when a line comes in on stdin")
    chosen = parser.parse_args(arguments)
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # Python's way of saying: not to be imported
    if chosen.wait:
        import_what_loading_needs(chosen.folder)
        if not sys.stdin.readline():  # whoever started this is gone
            return 1

    folder, digests, recorded = chosen.folder, None, None
    try:
        if (folder / "manifest.json").exists():
            from ulysses_exp.config.received.manifest import Manifest

            manifest = Manifest.read(folder)
            digests, recorded = manifest.module, manifest.function
            from ulysses_exp.config.received.reading import inside

            inside(_exported(folder), folder)
            folder = _exported(folder)
        if chosen.fingerprint is not None:
            digests = json.loads(chosen.fingerprint.read_text())
        result = check(folder, digests, chosen.batch, recorded)
    except Exception as error:
        print(f"{folder}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    chosen.out.write_text(strict_json.dumps(result, indent=1))
    from ulysses_exp.launch.environment import remove_empty_cache

    remove_empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
