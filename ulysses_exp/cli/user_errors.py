"""What Hydra, OmegaConf and argparse say, in a line that names the key or the override, and what to type instead."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ulysses_exp.config import ConfigError, known_keys, nearest
from ulysses_exp.config.bounds import leaves
from ulysses_exp.config.sections import configuration

#: OmegaConf's types as a user calls them
_KINDS = {
    "Integer": "a whole number",
    "Float": "a number",
    "Boolean": "true or false",
    "String": "a text",
    "string": "a text",
}

_LONGEST_LINE = 280  # characters


def user_message(error: BaseException, conf: Path, overrides: Iterable[str] = ()) -> str | None:
    """One or two lines for a mistake of the user's: the key, what is wrong, what to set. None for a mistake of ours.

    Args:
        conf: the folder of the groups.
        overrides: as they were typed; one that cannot be read is found among them.
    """
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, ConfigError):
        return _short(str(error))
    if isinstance(error, OverrideParseException):
        return _short(str(unreadable(error.override, str(error))))
    if isinstance(error, ValueError) and "Exceeds the limit" in str(error):
        key = next((o.partition("=")[0] for o in overrides if re.search(r"\d{4000}", o)), "command line")
        return f"{key}: a number of thousands of digits; set one that can be read"
    if isinstance(error, ValueError) and "Config group override" in str(error):
        return "command line: a group takes the name of a choice; python run.py --help lists them"
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    return _short(_of_hydra(error, conf))


def _of_hydra(error: Exception, conf: Path) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
        key = match[1] or getattr(cause, "full_key", None) or match[2]
        return f"{key}: unknown key; {nearest(key, sorted(known_keys()))}"
    if match := re.search(r"In '([^']*)': Could not find '([^']+)/([^']*)'", text):
        return _no_choice(match[1], match[2], match[3], conf)
    if match := re.search(r"'?([\w/]+)'? appears more than once in the final defaults list", text):
        return f"+{match[1]}: the group has a choice already; leave the + out: {match[1]}=..."
    key = getattr(cause, "full_key", None)
    first = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    if key:
        return f"{key}: {_of_omegaconf(key, first)}"
    return " ".join(text.split("\n")[:2])


def _of_omegaconf(key: str, said: str) -> str:
    """What OmegaConf `said` of the value of `key`, as `what is wrong; what to set`."""
    if match := re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", said, re.DOTALL):
        wanted = _KINDS.get(match[2], f"of type {match[2]}")
        return f"{match[1][:60]!r} is not {wanted}; set {example(key)}"
    if name := _named(key):
        return f"is a group and takes no such value; set its keys: {name}"
    if "is not Optional" in said:
        return f"null is no value of it; set {example(key)}"
    if "not a ListConfig, list or tuple" in said or "DictConfig with ListConfig" in said:
        return f"is a list; set {example(key)}"
    if re.search(r"Cannot convert '(list|dict)' to string", said):
        return f"is a text, no list or mapping; set {example(key)}"
    if said.startswith("Cannot assign"):
        return f"takes a mapping; set {example(key)}"
    if re.search(r"NoneType is not a subclass", said):
        return f"null is no value of it; set {example(key)}"
    if "does not support deletion" in said:
        return f"every job has it; leave ~{key} out, or set {example(key)}"
    if match := re.match(r'.*"Environment variable \'(.+)\' not found"', said):
        return f"the environment has no {match[1]}; set it, or write the value itself"
    if "interpolation" in said.lower():
        return f"{said[:120]}; write the value itself"
    return f"{said[:160]}; see python run.py --help"


def _named(key: str) -> str:
    """Some keys of a group, e.g. `sp.size=..., sp.attention=...`."""
    return ", ".join(f"{k}=..." for k in sorted(known_keys()) if k.startswith(f"{key}."))[:120].rpartition(",")[0]


def example(key: str) -> str:
    """`key=value` with the default of `key`, or with a value of its kind; `key=...` where neither is known."""
    node: Any = configuration()()
    kind: Any = None
    for name in re.sub(r"\[\d+\]", "", key).split("."):
        hints = get_type_hints(type(node)) if hasattr(node, "__dataclass_fields__") else {}
        kind = hints.get(name)
        node = getattr(node, name, None)
    plain = re.sub(r"\[\d+\]", "", key)
    if isinstance(node, bool):
        return f"{plain}={str(node).lower()}"
    if isinstance(node, list):
        return f"{plain}=[{','.join(map(str, node))}]"
    if isinstance(node, (int, float)) or (isinstance(node, str) and re.fullmatch(r"[\w.-]+", node)):
        return f"{plain}={node}"
    inside = get_args(kind)
    if isinstance(node, dict):
        return f"+{plain}.<name>=<value>"
    kinds: dict[Any, str] = {int: "1", float: "0.1", list[str]: "[...]"}
    return f"{plain}={next((kinds[k] for k in (*inside, kind) if k in kinds), '...')}"


def _no_choice(asked_in: str, group: str, wrong: str, conf: Path) -> str:
    """A group has no such file. Where the choice itself was found but is no choice, its own defaults fail."""
    inside, _, choice = asked_in.rpartition("/")
    if inside and inside in groups(conf):
        return f"{inside}: {choice!r} is not a choice; {_choices(inside, choice, conf)}"
    first = group.split("/")[0]
    if group not in groups(conf) and first in groups(conf):  # model=/etc/passwd, model=../config
        group, wrong = first, f"{group.partition('/')[2]}/{wrong}"
    if group not in groups(conf):
        return f"{group}: {wrong[:60]!r} is not a choice; is the plugin that brings it installed?"
    return f"{group}: {wrong[:60]!r} is not a choice; {_choices(group, wrong, conf)}"


def groups(conf: Path) -> set[str]:
    """The groups that have choices."""
    return {path.name for path in conf.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}


def _choices(group: str, wrong: str, conf: Path) -> str:
    known = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    if difflib.get_close_matches(wrong, known, 1, 0.5):
        return nearest(wrong, known)
    if wrong.isdecimal() and f"{group}.size" in known_keys():
        return f"set {group}.size={wrong}"
    return f"choose from {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


def check_overrides(overrides: Iterable[Any], conf: Path) -> None:
    """Raises ConfigError for what Hydra and OmegaConf would take as something else than was typed.

    That is a group that gets anything but one choice of its own, the end of a key that every job has, a number for
    true, and a text that reads as a number of another spelling.

    Args:
        overrides: parsed.
    """
    own, known = groups(conf), set(known_keys())
    kinds = {key: kind for key, _, kind in leaves(configuration()())}
    for override in overrides:
        key = override.key_or_group
        if key in kinds and not override.is_delete() and not override.is_sweep_override():
            _check_spelling(key, kinds[key], override.value(), override.input_line.partition("=")[2].strip())
        if not key:
            raise ConfigError(repr(override.input_line), "names no key", "write key=value, e.g. train.steps=20")
        if override.is_delete() and (key in own or key in known):
            raise ConfigError(f"~{key}", "every job has it", f"leave it out, or set {key}=...")
        if key not in own or override.is_sweep_override():
            continue
        value = override.value()
        if value is None and key == "experiment":
            continue
        if isinstance(value, dict):
            continue  # merged into the group's keys, each of which is checked
        if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+", value) or value.strip(".") == "":
            shown = override.get_value_element_as_str()[:60]
            problem = f"{shown!r} is {'several, and one is' if isinstance(value, list) else 'not'} a choice"
            raise ConfigError(key, problem, _choices(key, shown, conf))


def _check_spelling(key: str, kind: Any, value: Any, typed: str) -> None:
    """Raises ConfigError where OmegaConf would convert `value`, read from `typed`, to something that is not `typed`."""
    if kind is bool and isinstance(value, (int, float)) and not isinstance(value, bool) and value not in (0, 1):
        raise ConfigError(key, f"{typed[:60]!r} is not true or false", f"set {example(key)}")
    is_text = kind is str or str in get_args(kind)
    if is_text and isinstance(value, (bool, int, float)) and str(value) != typed:
        raise ConfigError(key, f"{typed[:60]!r} would be read as {str(value)[:60]}", f"write {_quoted(key, typed)}")


def unreadable(override: str, said: str = "") -> ConfigError:
    """Why Hydra's grammar does not read `override`, and how it would.

    Args:
        said: the parser's own words.
    """
    shown = override if len(override) <= 60 else f"{override[:57]}..."
    shown = shown.encode("utf-8", "backslashreplace").decode()
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    key, equals, value = override.partition("=")
    plain = key.lstrip("+~")
    name = f"override {shown}"
    if override.startswith("--"):
        return ConfigError(name, "overrides have no dashes", f"write {override.lstrip('-')[:60]}")
    if not equals:
        return ConfigError(
            name, "has no value", f"write {shown}=..." if re.fullmatch(r"[\w./@]+", plain) else "write key=value"
        )
    if not re.fullmatch(r"[\w./@-]+", plain) or ".." in plain or plain.startswith(".") or plain.endswith("."):
        return ConfigError(name, f"{plain[:40]!r} cannot be a key", "python run.py --help lists the keys")
    if match := re.search(r"Unknown function '(\w+)'", said):
        return ConfigError(name, f"there is no function {match[1]}", f"write {_quoted(key, value)}")
    if len(re.findall(r"[\[({]", value)) != len(re.findall(r"[\])}]", value)) or any(value.count(q) % 2 for q in "'\""):
        whole = "a bracket or a quote is open"
        return ConfigError(name, whole, f"close it and quote it all for the shell, or as a text {_quoted(key, value)}")
    return ConfigError(name, "has characters that have to be quoted", f"write {_quoted(key, value)}")


def _quoted(key: str, value: str) -> str:
    """The override with its value as a text, as it is typed in a shell."""
    value = value[:60].encode("utf-8", "replace").decode()
    return shlex.quote(f"{key}={hydra_text(value.strip(QUOTES))}")


QUOTES = "'\""


def hydra_text(value: str) -> str:
    """`value` in quotes, as Hydra's grammar reads it back: a backslash counts for itself, but before a quote."""
    inner = re.sub(r'(\\+)(?="|$)', r"\1\1", value).replace('"', '\\"')
    return f'"{inner}"'


def _short(message: str) -> str:
    """Two lines at most, without characters that do something to a terminal."""
    lines = [line for line in message.splitlines() if line.strip()][:2]
    plain = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines]
    return "\n".join(line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 3]}..." for line in plain)
