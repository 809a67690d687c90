"""Reads models' configurations and tokenizers with transformers but without torch: a process of its own.

`model_check` starts it and asks; a line of JSON each way. Without torch its start takes about a second and a half of
processor time, with it four times that. No code of a model's folder is executed here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ulysses_exp.config.model_rules import MIXING

_REACHABLE_WITHIN_S = 1.5


def main() -> None:
    """Reads without torch."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    answer(WORK)


def answer(work: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests on stdin, by the functions of `work`, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = work[request.pop("work")](**request)
        except Exception as error:  # whatever transformers finds wrong with what it was given
            found = {"error": _reason(error)}
        print(json.dumps(found, default=str), file=answers, flush=True)


def read_model(path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Builds the configuration that `models.pretrained_config` will build.

    Returns:
        `error` where that cannot be; `unknown_type` where transformers does not know it; else `causal_lm` and
        `masked_lm`, whether transformers has such a model of this type; `unknown`, keys of `given` that nothing reads;
        `defaults` of the type; and, where these do not end it: `text`, the settings of the part that reads text;
        `names`, what those are called that have a common name, too; `whole`, the settings of all of the model.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    base: dict[str, Any] = {}
    if path is not None:
        base, _ = PreTrainedConfig.get_config_dict(path, **_hub_options(path))
        if "model_type" not in base and not any(name in path for name in CONFIG_MAPPING_NAMES):
            return {"error": "config.json has no model_type"}
    kind = given.get("model_type", base.get("model_type"))
    if kind is not None and kind not in CONFIG_MAPPING_NAMES:
        return {"unknown_type": kind, "types": sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    of_type: dict[str, Any] = {}
    if kind is not None:
        of_type = {
            "type": kind,
            "causal_lm": kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "masked_lm": kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            "defaults": CONFIG_MAPPING[kind]().to_dict(),
            "unknown": _unknown(CONFIG_MAPPING[kind], given),
        }
        if of_type["unknown"] or not of_type["causal_lm"]:
            return of_type
    config = configuration(path, given)
    text = config.get_text_config(decoder=True)
    settings, names = text.to_dict(), dict(type(text).attribute_map)
    settings |= {common: settings[real] for common, real in names.items() if real in settings}
    return {
        **of_type,
        "type": config.model_type,
        "whole": config.to_dict(),
        "text": settings,
        "names": names,
        "causal_lm": config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked_lm": config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "rope_types": sorted(
            name.removeprefix("_validate_").removesuffix("_rope_parameters")
            for name in dir(type(text))
            if name.startswith("_validate_") and name.endswith("_rope_parameters")
        ),
        "activations": _activations(),
        "mixing": _mixing(config.model_type),
    }


def configuration(path: str | None, given: dict[str, Any]) -> Any:
    """transformers' configuration of the model in `path`, or of the type that `given` names, with `given` in it."""
    from transformers import AutoConfig

    if path is None:
        arguments = dict(given)
        return AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    return AutoConfig.from_pretrained(path, trust_remote_code=False, **given, **_hub_options(path))


def _unknown(kind: type, given: dict[str, Any]) -> list[list[Any]]:
    """[key, all known keys] of what the configuration would carry along and no model read.

    Keys from before transformers 5 (`rope_theta`) are known by what becomes of them: they turn into others.
    """
    known = {f.name for f in dataclasses.fields(kind)} | set(kind.attribute_map) | set(dir(kind))  # type: ignore[attr-defined, arg-type]
    strange = [key for key in given if key not in known and key != "model_type"]
    if not strange:
        return []
    by_default = vars(kind())
    kept = vars(kind(**{key: given[key] for key in strange}))
    names = sorted(name for name in known if not name.startswith("_") and not callable(getattr(kind, name, None)))
    return [[key, names] for key in strange if key in kept and key not in by_default]


def _mixing(kind: str) -> list[str]:
    """The functions that mix tokens without attention and are served, of those that the modeling file defines."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    if kind not in CONFIG_MAPPING_NAMES:
        return []
    package = importlib.util.find_spec(f"transformers.models.{model_type_to_module_name(kind)}")
    if package is None or package.origin is None:
        return []
    files = (path.read_text() for path in Path(package.origin).parent.glob("modeling_*.py"))
    return sorted({name for text in files for name in re.findall(r"^ *def (\w+)\(", text, re.MULTILINE)} & MIXING)


def _activations() -> list[str]:
    """The names of transformers' activation functions, read from its source, for importing them needs torch."""
    found = importlib.util.find_spec("transformers.activations")
    if found is None or found.origin is None:
        return []
    for node in ast.parse(Path(found.origin).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ACT2CLS":
            assert isinstance(node.value, ast.Dict)
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    return []


def read_tokenizer(path: str) -> dict[str, Any]:
    """`error` where there is no tokenizer in `path` that transformers can read; else its number of tokens."""
    from transformers import AutoTokenizer

    return {"tokens": len(AutoTokenizer.from_pretrained(path, trust_remote_code=False, **_hub_options(path)))}


WORK: dict[str, Callable[..., dict[str, Any]]] = {"model": read_model, "tokenizer": read_tokenizer}


def _hub_options(path: str) -> dict[str, Any]:
    """Asks the cache alone where the hub does not answer: otherwise that is tried for half a minute."""
    return {} if Path(path).expanduser().is_dir() or _hub_answers() else {"local_files_only": True}


def _hub_answers() -> bool:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    place = urlparse(proxy or ENDPOINT)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), _REACHABLE_WITHIN_S).close()
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    """The last line of what an error says, without the name of an error that it wraps."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return "it brings code of its own; set model.trust_remote_code=true if you trust that"
    if isinstance(error, OSError) and ("connect" in text or "cached files" in text or "local_files_only" in text):
        return "it is no folder here, not in the hub's cache, and the hub does not answer or is not to be asked"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    chosen = lines[-1] if "alidation error" in lines[0] else lines[0]
    head, colon, rest = chosen.partition(": ")
    return rest if colon and head.endswith("Error") and rest else chosen


if __name__ == "__main__":
    main()
