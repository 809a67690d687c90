"""Nothing in a run folder from somebody else is executed, interpolated, followed out of it or believed about sizes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import received_run
import yaml
from received_run import CONFIG, STEP, Checked, forge, open_checkpoint

from ulysses_exp.config import ConfigError, doors, known_keys
from ulysses_exp.config.received import sources
from ulysses_exp.config.received.manifest import Manifest
from ulysses_exp.config.received.reading import Refused
from ulysses_exp.layout import Layout

SECRET = "hf_FAKEFAKEFAKE"
Change = Callable[[Path, Path], None]  # (run folder, a folder outside of it)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "run"
    folder.mkdir()
    received_run.make(folder)
    return folder


@pytest.fixture(scope="module")
def checked(good: Path) -> Checked:
    found = Checked()
    assert found(good).train.seq_len == 64, "an honest run is taken over"
    return found


@pytest.fixture
def received(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a copy to change, a folder outside of it that holds what is nobody's business)."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(good, folder)
    outside.mkdir()
    shutil.copytree(good, outside / "run")
    return folder, outside


class Payload:
    def __init__(self, outside: Path):
        self.outside = outside

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.outside}/executed",)


def _set(folder: Path, key: str, value: object) -> None:
    content = yaml.safe_load((folder / CONFIG).read_text())
    *sections, name = key.split(".")
    node = content
    for section in sections:
        node = node[section]
    node[name] = value
    (folder / CONFIG).write_text(yaml.safe_dump(content))


def _text(folder: Path, text: str | bytes) -> None:
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())


def _latest(folder: Path, text: bytes) -> None:
    (folder / "checkpoints/latest").write_bytes(text)


def _linked(path: Path, target: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _engine(folder: Path, **entries: object) -> None:
    forge(folder, engine=Manifest.read(folder / STEP).engine | entries)


def _in_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / STEP / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def pickled(folder: Path, outside: Path) -> None:
    shutil.rmtree(folder / STEP)
    (folder / STEP).mkdir()
    (folder / STEP / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Payload(outside)))


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MANIFEST = str(STEP / "manifest.json")

CHANGES: dict[str, tuple[Change, tuple[str, ...]]] = {
    # its configuration
    "trusts its own code": (
        lambda f, o: _set(f, "model.trust_remote_code", True), ("model.trust_remote_code", str(CONFIG))
    ),
    "code on a hub": (lambda f, o: _set(f, "sp.attention", "somebody/kernel"), ("sp.attention", str(CONFIG))),
    "asks for the environment": (
        lambda f, o: _set(f, "model.name", "${oc.env:HF_TOKEN}"), (str(CONFIG), "model.name")
    ),
    "asks by another resolver": (
        lambda f, o: _set(f, "data.split", "${oc.decode:'${oc.env:HF_TOKEN}'}"), (str(CONFIG), "data.split")
    ),
    "in a name of a key": (
        lambda f, o: _set(f, "model.architecture", {"${oc.env:HF_TOKEN}": 1}), (str(CONFIG), "model.architecture")
    ),
    "python tag": (
        lambda f, o: _text(f, f"seed: !!python/object/apply:os.system ['touch {o}/executed']"), (str(CONFIG),)
    ),
    "python name": (lambda f, o: _text(f, "seed: !!python/name:os.system"), (str(CONFIG),)),
    "billion laughs": (lambda f, o: _text(f, LAUGHS), (str(CONFIG), "alias")),
    "deep": (lambda f, o: _text(f, "a: " + "[" * 20_000), (str(CONFIG), "levels")),
    "large": (lambda f, o: _text(f, "a: " + "x" * 10_000_000), (str(CONFIG), "bytes")),
    "not text": (lambda f, o: _text(f, b"\xff\xfe\x00model"), (str(CONFIG), "UTF-8")),
    "half written": (lambda f, o: _text(f, "model:\n  name: 'tiny"), (str(CONFIG), "line")),
    "empty": (lambda f, o: _text(f, ""), (str(CONFIG),)),
    "a list": (lambda f, o: _text(f, "[1, 2]"), (str(CONFIG),)),
    "a key twice": (lambda f, o: _text(f, "seed: 1\nseed: 2"), (str(CONFIG), "twice")),
    "wrong section": (lambda f, o: _set(f, "sp", [1]), (str(CONFIG), "sp")),
    "wrong type": (lambda f, o: _set(f, "train.steps", {"a": 1}), (str(CONFIG), "steps")),
    "unknown key": (lambda f, o: _set(f, "train.hook", "os.system"), (str(CONFIG), "hook")),
    "huge number": (lambda f, o: _set(f, "seed", 10**40), (str(CONFIG), "seed")),
    "no number": (lambda f, o: _set(f, "optim.lr", float("nan")), (str(CONFIG), "optim.lr")),
    "orders to the terminal": (lambda f, o: _set(f, "model.name", "\x1b]0;x\x07\x1b[2J"), (str(CONFIG), "model.name")),
    "a place to load from": (
        lambda f, o: _set(f, "model.architecture.cache_dir", "/"), ("model.architecture.cache_dir",)
    ),
    "a hundred thousand ranks": (lambda f, o: _set(f, "dp.size", 100_000), ("dp.size", str(CONFIG))),
    "configuration is a pipe": (lambda f, o: _pipe(f / CONFIG), (str(CONFIG), "regular")),
    "configuration is elsewhere": (lambda f, o: _linked(f / CONFIG, o / "run" / CONFIG), (str(CONFIG), "leads out")),
    "configuration is a device": (lambda f, o: _linked(f / CONFIG, Path("/dev/zero")), (str(CONFIG), "leads out")),
    # its pointer
    "latest leads out": (lambda f, o: _latest(f, b"../../outside/run/checkpoints/step1"), ("latest",)),
    "latest is absolute": (lambda f, o: _latest(f, b"/etc"), ("latest",)),
    "latest is empty": (lambda f, o: _latest(f, b""), ("latest",)),
    "latest is binary": (lambda f, o: _latest(f, b"\xff\x00\x01"), ("latest", "UTF-8")),
    "latest is a pipe": (lambda f, o: _pipe(f / "checkpoints/latest"), ("latest", "regular")),
    "latest is elsewhere": (
        lambda f, o: _linked(f / "checkpoints/latest", o / "run/checkpoints/latest"), ("latest", "leads out")
    ),
    "step is elsewhere": (lambda f, o: _linked(f / STEP, o / "run" / STEP), (str(STEP), "leads out")),
    # its manifest
    "pickles only": (pickled, ("checkpoint.trust_pickle", str(STEP))),
    "manifest is a pipe": (lambda f, o: _pipe(f / MANIFEST), (MANIFEST, "regular")),
    "manifest is elsewhere": (lambda f, o: _linked(f / MANIFEST, o / "run" / MANIFEST), (MANIFEST, "leads out")),
    "step is huge": (lambda f, o: forge(f, step=10**30), (MANIFEST, "step is not a number of steps")),
    "step is negative": (lambda f, o: forge(f, step=-1), (MANIFEST, "step is not a number of steps")),
    "step is a truth": (lambda f, o: forge(f, step=True), (MANIFEST, "step is not a number of steps")),
    "step is a text": (lambda f, o: forge(f, step="1"), (MANIFEST, "step is not a number of steps")),
    "counter is a text": (lambda f, o: _engine(f, global_steps="7"), (MANIFEST, "global_steps")),
    "rate is a text": (lambda f, o: _engine(f, groups=[{"lr": "1e-3"}]), (MANIFEST, "learning rates")),
    "counter is endless": (lambda f, o: _in_manifest(f, '"global_steps": 1', '"global_steps": 1e999'), (MANIFEST,)),
    "counter is NaN": (lambda f, o: _in_manifest(f, '"global_steps": 1', '"global_steps": NaN'), (MANIFEST, "NaN")),
    "two steps": (lambda f, o: _in_manifest(f, '"step": 1', '"step": 1, "step": 2'), (MANIFEST, "twice")),
    "no such layout": (lambda f, o: forge(f, layout="sp1-dp99999999999999-z0"), (MANIFEST, "layout")),
    "files lead out": (
        lambda f, o: forge(f, files={"../../../outside/x": {"bytes": 1, "header_sha256": ""}}), (MANIFEST,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_refused_in_one_line_before_anything_starts(
    change: str, received: tuple[Path, Path], checked: Checked
) -> None:
    folder, outside = received
    alter, words = CHANGES[change]
    alter(folder, outside)
    began = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        checked(folder)
    message = str(refused.value)
    assert time.monotonic() - began < 5, "2 s where nobody else works on the machine"
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 500 + 2 * len(str(folder)) and message.isprintable()
    assert SECRET not in message
    assert not (outside / "executed").exists()


@pytest.mark.parametrize("place", ["/etc", "/etc/passwd", "/proc", "/dev/zero"])
def test_a_source_that_is_no_run(place: str, checked: Checked) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.source"):
        checked(Path(place))


def test_what_the_user_trusts_or_not_goes_on(received: tuple[Path, Path], checked: Checked) -> None:
    _set(received[0], "model.trust_remote_code", True)
    for own in (True, False):
        config = checked(received[0], f"model.trust_remote_code={str(own).lower()}")
        assert config.model.trust_remote_code is own


def test_every_door_is_known_and_none_is_inherited(received: tuple[Path, Path], checked: Checked) -> None:
    known = doors()
    sounds_like_one = (
        "trust",
        "push",
        "remote",
        "online",
        "upload",
        "token",
        "unsafe",
        "exec",
        "hook",
        "script",
        "url",
    )
    for key in known_keys():
        name = key.rsplit(".", 1)[-1]
        if any(word in name.split("_") for word in sounds_like_one):
            assert key in known, f"{key} may let code in or data out: mark it with `_door`, or call it something else"
    assert {"model.trust_remote_code", "checkpoint.trust_pickle", "tracker.mode", "sp.attention"} <= known.keys()
    open_values = (True, "online", "somebody/code")
    for key, opens in known.items():
        value = next(v for v in open_values if opens(v) and (not isinstance(v, bool) or opens is bool))
        _set(received[0], key, value)
        try:
            section, _, name = key.partition(".")
            assert not opens(getattr(getattr(checked(received[0]), section), name)), key
        except ConfigError as refused:
            assert refused.key == key
        shutil.copy(received[1] / "run" / CONFIG, received[0] / CONFIG)


def test_a_folder_name_that_a_command_would_interpolate(tmp_path: Path, good: Path) -> None:
    shutil.copytree(good, tmp_path / "sweep" / "${oc.env:HF_TOKEN}")
    shutil.copytree(good, tmp_path / "sweep" / "other")
    with pytest.raises(ConfigError, match="misread"):
        sources.run_folders(str(tmp_path / "sweep"))


def test_a_manifest_starts_no_more_ranks_than_the_job_asks_for(received: tuple[Path, Path], checked: Checked) -> None:
    config = checked(received[0], "stages=[reload]", "reload.layouts=[sp2-dp1-z0]")
    assert sources.comparison_layout(config, Layout.parse("sp1-dp64-z0")) == config.layout
    assert sources.comparison_layout(config, Layout.parse("sp1-dp4-z0")) == config.layout
    assert sources.comparison_layout(config, Layout.parse("sp1-dp2-z1")) == Layout(1, 2, 1)


@pytest.mark.parametrize(
    "text",
    ['[[1, 2]]', '{"stages": 1}', '{"stages": {"train": {"continuation_loss": [1.0, NaN, 2.0]}}}',
     '{"stages": {"train": {"continuation_loss": [1.0, "2.0", 2.0]}}}',
     '{"stages": {"train": {"continuation_loss": [1.0]}}}', "nonsense", "[" * 100_000, "\ud800"],
)  # fmt: skip
def test_losses_that_are_none_are_not_compared_with(text: str, received: tuple[Path, Path]) -> None:
    folder = received[0]
    assert sources.continuation_losses(folder, 3) == [1.0, 2.0, 3.0]
    (folder / "results.json").write_bytes(text.encode(errors="surrogatepass"))
    try:
        assert sources.continuation_losses(folder, 3) is None
    except Refused as refused:
        assert str(refused).startswith(str(folder / "results.json")) and "\n" not in str(refused)


def _forged_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A safetensors header whose digest in the manifest is right."""
    (path,) = (folder / STEP / "portable").glob("weights-*")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(next(entry for name, entry in header.items() if name != "__metadata__"))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    path.write_bytes(data)
    digest = hashlib.sha256(data[: 8 + len(text)]).hexdigest()
    files = Manifest.read(folder / STEP).files
    forge(folder, files=files | {path.name: {"bytes": len(data), "header_sha256": digest}})


IN_RANKS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "tensors are elsewhere": (
        lambda f, o: _linked(f / STEP / "portable", o / "run" / STEP / "portable"), ("portable", "leads out")
    ),
    "beyond the file": (lambda f, o: _forged_header(f, lambda e: e.update(data_offsets=[0, 2**40])), ("header",)),
    "before the file": (lambda f, o: _forged_header(f, lambda e: e.update(data_offsets=[-4096, 4096])), ("header",)),
    "no shape": (lambda f, o: _forged_header(f, lambda e: e.pop("shape")), ("header",)),
    "no such type": (lambda f, o: _forged_header(f, lambda e: e.update(dtype="OBJECT")), ("header",)),
    "schedule of texts": (
        lambda f, o: _engine(f, scheduler=Manifest.read(f / STEP).engine["scheduler"] | {"last_epoch": "1"}),
        ("scheduler",),
    ),
    "generators of nothing": (lambda f, o: _engine(f, generators=[{"cpu": "AAAA"}]), ("manifest.json",)),
}  # fmt: skip


@pytest.mark.parametrize("change", IN_RANKS)
def test_what_only_a_rank_sees_is_refused_there(change: str, received: tuple[Path, Path]) -> None:
    from checkpoint_ranks import run

    folder, outside = received
    alter, words = IN_RANKS[change]
    alter(folder, outside)
    (message,) = run(1, open_checkpoint, folder / STEP, timeout=60)
    assert message.startswith(str(folder)) and all(word in message for word in words), message
    assert "\n" not in message
