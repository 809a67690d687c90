"""The model's configuration, built and checked before a rank starts.

`model_reader`, a process without torch, builds it; the choices of conf/model are held right by a test and ask nobody.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import json
import os
import select
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ulysses_exp.config import Config, ConfigError, check_objective, model_rules, nearest, stages, tried
from ulysses_exp.config.paths import CONF
from ulysses_exp.layout import Layout

_HUB_S, _HERE_S = 20, 300  # for an answer; a model on a slow network is then left to the ranks

#: Names of transformers' attention functions that read whole sequences and need no mask of n x n
ATTENTION = ("auto", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def check(config: Config) -> None:
    """Raises ConfigError for a model that cannot be built, is no causal LM, or does not fit the layout or the length.

    Code that a model's folder brings is run by ranks alone, so with `model.trust_remote_code` nothing is built here.
    """
    model = config.model
    _check_attention(config)
    if model.name_or_path is not None:
        _check_folder(config, model.name_or_path)
    if model.trust_remote_code or (model.name_or_path is not None and _elsewhere(config)):
        return
    # a choice of conf/model is known to be right, but not to be one that upstream's exchange has shapes for
    if model.name_or_path is None and model.architecture == _shipped(model.name) and config.sp.exchange == "fused":
        model_rules.check_length(config, model.architecture)
        return
    _check_built(config)
    if (tokenizer := _tokenizer(config)) is not None:
        found = ask("tokenizer", path=tokenizer)
        if found and "error" in found:
            key = "data.tokenizer" if config.data.tokenizer else "model.name_or_path"
            problem = f"no tokenizer in {tokenizer} ({found['error']})"
            raise ConfigError(key, problem, "set data.tokenizer to a folder or hub name")


def _check_built(config: Config) -> None:
    model = config.model
    built = ask("model", path=model.name_or_path, given=model.architecture)
    if built is None:
        return
    kind = built.get("type")
    if "unknown_type" in built:
        wrong = built["unknown_type"]
        close = difflib.get_close_matches(str(wrong), built["types"], 3, 0.5)
        instead = (
            f"did you mean {' or '.join(close)}?" if close else "set one that AutoModelForCausalLM knows, e.g. llama"
        )
        key = model_rules.key_of(config, "model_type")
        raise ConfigError(key, f"{str(wrong)[:60]!r} is no model of this version of transformers", instead)
    if not built.get("causal_lm", True):
        problem = f"{kind} is no causal LM for transformers"
        key = "model.name_or_path" if model.name_or_path else "model.architecture.model_type"
        raise ConfigError(key, problem, "set one that AutoModelForCausalLM takes, e.g. llama")
    if built.get("unknown"):
        model_rules.check_causal(config, built["defaults"] | model.architecture, built["masked_lm"])
    for key, known in built.get("unknown", ()):
        instead = f"leave it out: ~model.architecture.{key}" if key in (_shipped(model.name) or ()) else ""
        problem = f"unknown key of {kind}"
        raise ConfigError(f"model.architecture.{key}", problem, instead or _nearest_key(key, known))
    if "error" in built:
        raise _not_built(config, built["error"])
    text, names = built["text"], built["names"]
    model_rules.check_causal(config, text | built["whole"], built["masked_lm"])
    model_rules.check_sizes(config, text, names)
    check_objective(config, text)
    model_rules.check_rope(config, text)
    _check_names(config, built)
    model_rules.check_length(config, text, names.get("max_position_embeddings", "max_position_embeddings"))
    _check_sharding(config, text, str(kind), built["mixing"])


def _nearest_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, 1, 0.5)
    return f"did you mean {close[0]}?" if close else "see the configuration class in transformers for its keys"


def _not_built(config: Config, reason: str) -> ConfigError:
    model = config.model
    said = reason.lower().replace(" ", "_")
    named = [key for key in model.architecture if key.lower() in said]
    if named:
        return ConfigError(f"model.architecture.{named[0]}", reason, "set another value")
    if model.name_or_path is not None:
        problem = f"no model in {model.name_or_path} ({reason.rstrip('.')})"
        return ConfigError("model.name_or_path", problem, "set a local folder or a hub name")
    return ConfigError("model.architecture", reason.rstrip("."), "set sizes that fit each other")


def _check_names(config: Config, built: dict[str, Any]) -> None:
    """Names that transformers looks up only when the model is built."""
    text = built["text"]
    for rope in model_rules.ropes(text):
        kind = rope.get("rope_type", "default")
        if built["rope_types"] and kind not in built["rope_types"]:
            key = model_rules.key_of(config, "rope_parameters")
            raise ConfigError(
                f"{key}.rope_type", f"{str(kind)[:60]!r} is not a choice", nearest(str(kind), built["rope_types"])
            )
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = text.get(name)
        if (
            name in config.model.architecture
            and isinstance(value, str)
            and built["activations"]
            and value not in built["activations"]
        ):
            close = difflib.get_close_matches(value, built["activations"], 1, 0.5)
            instead = f"did you mean {close[0]}?" if close else "set e.g. silu or gelu"
            raise ConfigError(f"model.architecture.{name}", f"{value[:60]!r} is no activation function", instead)


def _check_sharding(config: Config, text: dict[str, Any], kind: str, mixing: list[str]) -> None:
    if "num_attention_heads" not in text:
        key = "model.name_or_path" if config.model.name_or_path else "model.architecture.model_type"
        raise ConfigError(key, f"{kind} has no attention for sp.attention to run", "set a model that has, e.g. llama")
    layouts = {"sp.size": config.layout}
    if "reload" in config.stages:
        layouts |= {"reload.layouts": max(map(Layout.parse, config.reload.layouts or ()), default=config.layout)}
    for key, layout in layouts.items():
        if layout.sp == 1:
            continue
        why = model_rules.why_not_sharded(kind, text.get("layer_types"), mixing)
        why = why or _why_not_in_slices(config, kind, text)
        if why is not None:
            raise ConfigError(key, why, "set sp.size=1" if key == "sp.size" else "name layouts with sp1 only")
        if config.sp.exchange == "deepspeed" and text.get("num_key_value_heads") is None:
            problem = f"{kind} is configured without num_key_value_heads, which deepspeed's reads"
            raise ConfigError("sp.exchange", problem, "set sp.exchange=fused")


def _why_not_in_slices(config: Config, kind: str, text: dict[str, Any]) -> str | None:
    """What a tiny copy of the model shows, where nobody knows whether slices of sequences give the right numbers."""
    if tried.right(kind, text):
        return None
    found = ask("slices", path=config.model.name_or_path, given=config.model.architecture)
    return None if found is None else found.get("why")


def _check_attention(config: Config) -> None:
    """A name with a slash is a kernel of the hub."""
    name = config.sp.attention
    if name == "transformers":
        return
    if name not in ATTENTION and "/" not in name:
        raise ConfigError("sp.attention", f"{name!r} is not a choice", nearest(name, [*ATTENTION, "transformers"]))


def _check_folder(config: Config, name: str) -> None:
    """What can be seen of a local folder without reading its model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError("model.name_or_path", f"{name} is a file", "set the folder that it is in, or a hub name")
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ConfigError("model.name_or_path", f"{name} does not exist", "set a local folder or a hub name")
        return
    if not (folder / "config.json").is_file():
        raise ConfigError("model.name_or_path", f"no model in {name} (no config.json)", "set a folder that has one")
    if not config.model.pretrained or config.checkpoint.source is not None or _reads_nothing(config):
        return
    instead = "set a folder that has them, or model.pretrained=false"
    kinds = ("model.safetensors", "pytorch_model.bin")
    if not any((folder / kind).exists() or (folder / f"{kind}.index.json").exists() for kind in kinds):
        raise ConfigError("model.name_or_path", f"no weights in {name} (no model.safetensors)", instead)
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / kinds[0]).exists():
        try:
            parts = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ConfigError("model.name_or_path", f"{index} is no index of weights ({error})", instead) from None
        lost = sorted(str(part) for part in parts if not (folder / str(part)).is_file())
        if lost:
            raise ConfigError(
                "model.name_or_path", f"{name} lacks {len(lost)} files of weights, e.g. {lost[0]}", instead
            )


def _reads_nothing(config: Config) -> bool:
    """A plan needs the model's shape alone."""
    return not stages.starts_ranks(config)


def _elsewhere(config: Config) -> bool:
    """Whether the ranks, on other machines, may see a hub or a cache that this one does not."""
    name = config.model.name_or_path
    return config.launch.name == "slurm" and name is not None and not Path(name).expanduser().exists()


def _tokenizer(config: Config) -> str | None:
    """The local folder of the tokenizer that the data needs; None where bytes are tokens, or it is not here."""
    if config.data.name == "synthetic" or _reads_nothing(config):
        return None
    path = config.data.tokenizer or config.model.name_or_path
    if path is None or not Path(path).expanduser().is_dir():
        return None
    folder = Path(path).expanduser()
    return None if config.data.tokenizer is None and not any(folder.glob("tokenizer*")) else str(folder)


@cache
def _shipped(name: str) -> dict[str, Any] | None:
    """The architecture of a choice of conf/model by its name."""
    path = CONF / "model" / f"{name}.yaml"
    if not path.is_file():
        return None
    return OmegaConf.to_container(OmegaConf.load(path)).get("architecture")  # type: ignore[union-attr]


class _Reader:
    """A process that reads, `module`, started when it is first asked."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: str, patience_s: float) -> dict[str, Any] | None:
        """None where it does not answer in time, or ended: what it was to find out is then left to the ranks."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], patience_s)
            line = self._process.stdout.readline() if ready else ""
        except OSError:
            line = ""
        if not line:
            self.close()
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        import ulysses_exp

        here = str(Path(ulysses_exp.__file__).resolve().parents[1])
        paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(OSError):
                    stream.close()


_reader = _Reader("ulysses_exp.model.reader")
_trier = _Reader("ulysses_exp.model.outside_attention")  # with torch: some seconds, for models that nobody has tried
_answers: dict[str, dict[str, Any] | None] = {}


def ask(work: str, **arguments: Any) -> dict[str, Any] | None:
    """The answer of a reader to a request, asked once; None where there is none."""
    request = json.dumps({"work": work, **arguments}, sort_keys=True, default=str)
    if request not in _answers:
        path = arguments.get("path")
        here = path is None or Path(path).expanduser().exists()
        reader = _trier if work == "slices" else _reader
        _answers[request] = reader.ask(request, _HERE_S if here else _HUB_S)
    return _answers[request]


def close() -> None:
    """Lets the readers go. They start again if they are asked again."""
    _reader.close()
    _trier.close()


atexit.register(close)
