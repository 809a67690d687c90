"""A damaged, foreign or malicious checkpoint is refused in one line that names the file; nothing in it is executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import run
from safetensors.torch import save_file
from tiny_engine import Recipe, engine, steps

from ulysses_exp.config.received.manifest import Manifest
from ulysses_exp.layout import Layout
from ulysses_exp.rank import checkpoints

ONE = Layout(1, 1, 0)
WEIGHTS = "portable/weights-00001-of-00001.safetensors"
MOMENT = "portable/exp_avg-00001-of-00001.safetensors"
Damage = Callable[[Path, Path], None]  # (checkpoint, a folder outside of it)


def make(folder: Path) -> None:
    with engine(ONE) as made:
        steps(made, ONE, 0, 1)
        checkpoints.save(made, folder, layout=ONE, step=1, state={})


def attempt(folder: Path, recipe: Recipe) -> str:
    with engine(ONE, recipe, seed=1) as made:
        try:
            checkpoints.load(made, folder, layout=ONE)
        except checkpoints.CheckpointError as error:
            return str(error)
    return "loaded"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "checkpoints" / "step1"
    run(1, make, folder)
    assert run(1, attempt, folder, Recipe()) == ["loaded"]
    return folder


def truncated(folder: Path, _: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def empty(folder: Path, _: Path) -> None:
    (folder / MOMENT).write_bytes(b"")


def longer(folder: Path, _: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 8)


def missing(folder: Path, _: Path) -> None:
    (folder / MOMENT).unlink()


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def bit_in_weights(folder: Path, _: Path) -> None:
    _flip(folder / WEIGHTS, -1000)


def bit_in_states(folder: Path, _: Path) -> None:
    _flip(folder / MOMENT, -4)


def bit_in_header(folder: Path, _: Path) -> None:
    _flip(folder / WEIGHTS, 100)


def huge_header(folder: Path, _: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[:8] = (2**63).to_bytes(8, "little")
    (folder / WEIGHTS).write_bytes(data)


def header_of_nan(folder: Path, _: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 : 8 + length] = b'{"a":NaN}'.ljust(length)
    (folder / WEIGHTS).write_bytes(data)


def foreign_file(folder: Path, _: Path) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, folder / WEIGHTS)


def swapped_files(folder: Path, outside: Path) -> None:
    (folder / WEIGHTS).rename(outside / "swap")
    (folder / MOMENT).rename(folder / WEIGHTS)
    (outside / "swap").rename(folder / MOMENT)


class _Payload:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def pickle_in_place_of_safetensors(folder: Path, outside: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(_Payload(f"touch {outside}/executed")))


def pickle_of_the_same_size(folder: Path, outside: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    (folder / WEIGHTS).write_bytes(pickle.dumps(_Payload(f"touch {outside}/executed")).ljust(size, b"\0"))


def link(folder: Path, outside: Path) -> None:
    shutil.move(folder / WEIGHTS, outside / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(outside / "elsewhere.safetensors")


def folder_in_place_of_a_file(folder: Path, _: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def named_pipe(folder: Path, _: Path) -> None:
    (folder / MOMENT).unlink()
    os.mkfifo(folder / MOMENT)


def no_manifest(folder: Path, _: Path) -> None:
    (folder / "manifest.json").unlink()


def half_a_manifest(folder: Path, _: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def edited_manifest(folder: Path, _: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 1,', '"step": 7,', 1))


def extra_key_in_manifest(folder: Path, _: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 1,', '"step": 1, "more": 1,', 1))


def deep_manifest(folder: Path, _: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)


def manifest_of_another_program(folder: Path, _: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"layout": "sp1-dp1-z0"}))


def _forge(folder: Path, change: Callable[[Manifest], None]) -> None:
    """A manifest whose checksum is right and whose content is not."""
    manifest = Manifest.read(folder)
    change(manifest)
    manifest.write(folder)


def path_out_of_the_checkpoint(folder: Path, outside: Path) -> None:
    shutil.copy(folder / WEIGHTS, outside / "weights-00001-of-00001.safetensors")
    name = os.path.relpath(outside / "weights-00001-of-00001.safetensors", folder / "portable")
    _forge(folder, lambda m: m.files.update({name: m.files.pop(Path(WEIGHTS).name)}))


def absolute_path(folder: Path, outside: Path) -> None:
    _forge(folder, lambda m: m.files.update({"/etc/passwd": m.files.pop(Path(WEIGHTS).name)}))


def file_without_size(folder: Path, _: Path) -> None:
    _forge(folder, lambda m: m.files[Path(WEIGHTS).name].pop("bytes"))


def weights_of_the_wrong_type(folder: Path, _: Path) -> None:
    _forge(folder, lambda m: setattr(m, "weights", ["model.norm.weight"]))


def extra_tensor(folder: Path, _: Path) -> None:
    _forge(folder, lambda m: m.weights.update({"model.more.weight": "0" * 16}))


def state_of_no_parameter(folder: Path, _: Path) -> None:
    _forge(folder, lambda m: m.states["exp_avg"].pop("model.norm.weight"))


DAMAGES: dict[Damage, str] = {
    truncated: WEIGHTS, empty: MOMENT, longer: WEIGHTS, missing: MOMENT,
    bit_in_weights: WEIGHTS, bit_in_states: MOMENT, bit_in_header: WEIGHTS,
    huge_header: WEIGHTS, header_of_nan: WEIGHTS, foreign_file: WEIGHTS, swapped_files: WEIGHTS,
    pickle_in_place_of_safetensors: WEIGHTS, pickle_of_the_same_size: WEIGHTS,
    link: WEIGHTS, folder_in_place_of_a_file: WEIGHTS, named_pipe: MOMENT,
    no_manifest: "manifest.json", half_a_manifest: "manifest.json", edited_manifest: "manifest.json",
    extra_key_in_manifest: "manifest.json", deep_manifest: "manifest.json",
    manifest_of_another_program: "manifest.json",
    path_out_of_the_checkpoint: "manifest.json", absolute_path: "manifest.json", file_without_size: "manifest.json",
    weights_of_the_wrong_type: "manifest.json", extra_tensor: "manifest.json", state_of_no_parameter: "manifest.json",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_clear_line(damage: Damage, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step1"
    shutil.copytree(good, folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    damage(folder, outside)
    before = _contents(tmp_path)
    (message,) = run(1, attempt, folder, Recipe(), timeout=30)
    assert message.startswith(str(folder / DAMAGES[damage]) + ": "), message
    assert "\n" not in message and len(message) < len(str(folder)) + 200
    assert not (outside / "executed").exists()
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        (Recipe("sgd"), "AdamW"),
        (Recipe(layers=1), "belongs to another model"),
        (Recipe(layers=3), "belongs to another model"),
        (Recipe(tied=True), "belongs to another model"),
        (Recipe(hidden=64), "this model's is F32 [64, 64]"),
    ],
    ids=["optimizer", "fewer layers", "more layers", "tied", "wider"],
)
def test_a_checkpoint_of_something_else(recipe: Recipe, problem: str, good: Path) -> None:
    (message,) = run(1, attempt, good, recipe)
    assert message.startswith(str(good)) and problem in message


def attempt_at_stage_2(folder: Path, recipe: Recipe) -> str:
    layout = Layout(1, 1, 2)
    with engine(layout, recipe) as made:
        try:
            checkpoints.load(made, folder, layout=layout)
        except checkpoints.CheckpointError as error:
            return str(error)
    return "loaded"


def test_another_model_is_told_where_weights_are_stepped_as_one_tensor(good: Path) -> None:
    (message,) = run(1, attempt_at_stage_2, good, Recipe(layers=3))
    assert message.startswith(str(good)) and "belongs to another model" in message


def attempt_on_two(folder: Path) -> str:
    layout = Layout(1, 2, 3)
    with engine(layout) as made:
        try:
            checkpoints.load(made, folder, layout=layout)
        except checkpoints.CheckpointError as error:
            return str(error)
    return "loaded"


def test_all_ranks_say_the_same(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step1"
    shutil.copytree(good, folder)
    bit_in_states(folder, tmp_path)
    first, second = run(2, attempt_on_two, folder)
    assert first == second and first.startswith(str(folder / MOMENT))


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }
