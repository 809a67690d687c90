"""What `checkpoint.source` means: which run folders it names, and the configuration that their checkpoints go with.

A source may come from somebody else. What it says of the experiment is taken over and checked like the user's own
words; what it says of the machine is not: how many ranks to start, which code to trust, where results go.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ulysses_exp.config import stages
from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.keys import doors
from ulysses_exp.config.layout_rules import check_layout
from ulysses_exp.config.paths import matching
from ulysses_exp.config.received.manifest import NAME as MANIFEST
from ulysses_exp.config.received.manifest import CheckpointError, Manifest
from ulysses_exp.config.received.reading import Refused, inside, read_json, read_text, read_yaml
from ulysses_exp.config.schema import Config
from ulysses_exp.config.sections import configuration
from ulysses_exp.layout import Layout

#: What a checkpoint was trained as. A job that starts from it runs with the same, except for what its user overrides
#: and for what opens a door (`config.doors`).
INHERITED = ("model", "sp", "dp", "zero", "data", "memory", "train", "optim", "seed")

#: Ranks that a source may ask for unless the user asks for as many.
MOST_RANKS = 64

_TAG = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}")
_DEEPEST, _MOST_FOLDERS = 5, 20_000  # where runs are looked for
_NO_RUNS = [Path("/proc"), Path("/sys"), Path("/dev")]
_ANOTHER = "set a run folder, a checkpoint or a sweep folder, e.g. outputs/..."


def run_folders(source: str) -> list[Path]:
    """The run folders that `source` names: a run folder, a checkpoint in one, a sweep folder, or a glob of these.

    Raises:
        ConfigError: the name of one of them would be read as something else where it is used.
    """
    found: list[Path] = []
    for match in matching(source):
        path = Path(match)
        if _is_run(path) or (path / MANIFEST).exists() or (path / "checkpoints" / "latest").exists():
            found.append(path)
        elif path.is_dir():
            found += sorted(run for run in _runs_below(path) if (run / "checkpoints" / "latest").exists())
    for path in found:
        if re.search(r"[\x00-\x1f\x7f]|\$\{", str(path)):
            raise ConfigError(
                "checkpoint.source", f"{str(path)!r} is a name that commands misread", "rename the folder"
            )
    return found


def _is_run(path: Path) -> bool:
    return (path / ".hydra").is_dir()


def _runs_below(top: Path) -> Iterator[Path]:
    """Run folders a few levels below `top`; links are not followed, what cannot be read is passed by."""
    if any(top.resolve().is_relative_to(place) for place in _NO_RUNS):
        return
    depth = len(top.parts)
    for seen, (place, inner, _) in enumerate(os.walk(top)):
        path = Path(place)
        inner[:] = [name for name in inner if name != "previous"]  # outputs that were moved aside
        if ".hydra" in inner:
            yield path
            inner.clear()
        elif seen >= _MOST_FOLDERS or len(path.parts) - depth >= _DEEPEST:
            inner.clear()


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run folder, or the folder itself where it is one. Raises Refused."""
    if (folder / MANIFEST).exists():
        return folder
    latest = folder / "checkpoints" / "latest"
    if not latest.exists() and not latest.is_symlink():
        raise Refused(folder, "holds no checkpoint (no checkpoints/latest)")
    name = read_text(latest, folder, 200).strip()
    if not _TAG.fullmatch(name):
        raise Refused(latest, f"names no folder beside it: {name[:60]!r}")
    checkpoint = latest.parent / name
    inside(checkpoint, folder)
    return checkpoint


def newest_manifests(source: str) -> list[Path]:
    """The manifests of the newest checkpoints that `source` names."""
    manifests = []
    for folder in run_folders(source):
        try:
            manifest = newest_checkpoint(folder) / MANIFEST
        except Refused:
            continue
        if manifest.is_file():
            manifests.append(manifest)
    return manifests


def continuation_losses(folder: Path, steps: int) -> list[float] | None:
    """The next losses of the run in `folder` after its last checkpoint, as its results.json has them.

    None where it has no `steps` of them: what else it says is not used. Raises Refused where the file is damaged.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    node: Any = read_json(path, folder, finite=False)
    for name in ("stages", "train", "continuation_loss"):
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, list) or len(node) < steps:
        return None
    losses = [float(loss) for loss in node[:steps] if type(loss) in (int, float) and abs(loss) < 1e30]  # no NaN either
    return losses if len(losses) == steps else None


def comparison_layout(config: Config, saved: Layout) -> Layout:
    """Where a checkpoint goes on to be compared with: as it was saved, if the job asks for as many ranks anyway.

    A manifest may name any layout; whoever wrote it does not decide how many ranks start here.
    """
    targets = [Layout.parse(name) for name in config.reload.layouts or ()]
    if saved.world > max(layout.world for layout in (config.layout, *targets)):
        return config.layout
    try:
        check_layout(config, saved, "checkpoint.source")
    except ConfigError:
        return config.layout
    return saved


def inherit(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """`cfg` with the sections of the source's configuration, then with the user's own `overrides` of them again.

    Raises:
        ConfigError: the source holds no checkpoint that the stages could use, it is not to be believed, or another
            optimizer is asked for than the one whose states the checkpoint holds.
    """
    source = cfg.checkpoint.source
    if source is None or not matching(source):
        return cfg  # `config.check` says that it is not there
    folders = run_folders(source)
    if not folders:
        raise ConfigError("checkpoint.source", f"{source} holds no run and no checkpoint", _ANOTHER)
    try:
        if any(name in stages.names() and stages.stage(name).from_checkpoint for name in cfg.stages):
            _check_checkpoint(folders[0], bool(cfg.checkpoint.trust_pickle))
        run = folders[0]
        if (run / MANIFEST).exists() and run.resolve().parent.name == "checkpoints":
            run = run.resolve().parent.parent
        saved = run / ".hydra" / "config.yaml"
        if not saved.exists() and not saved.is_symlink():
            return cfg
        return _merged(cfg, read_yaml(saved, run), saved, overrides)
    except (Refused, CheckpointError) as error:
        raise ConfigError("checkpoint.source", str(error), _ANOTHER) from None


def _check_checkpoint(folder: Path, trust_pickle: bool) -> None:
    """Raises Refused, CheckpointError, ConfigError where `folder` holds no checkpoint that can be opened."""
    checkpoint = newest_checkpoint(folder)
    if not (checkpoint / MANIFEST).exists() and any(checkpoint.glob("*_states.pt")):
        if not trust_pickle:
            problem = f"{checkpoint} holds pickled files, which can execute code"
            raise ConfigError("checkpoint.trust_pickle", problem, "set it to true if you trust them")
        return
    Manifest.read(checkpoint)


def _merged(cfg: DictConfig, trained: dict[str, Any], saved: Path, overrides: list[str]) -> DictConfig:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    asked = OverridesParser.create().parse_overrides(overrides)
    chosen = {override.key_or_group for override in asked}
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    sections = {name: trained[name] for name in INHERITED if name in trained and name not in chosen}
    for name, section in sections.items():
        if isinstance(plain[name], dict) and not isinstance(section, dict):
            raise Refused(saved, f"{name}: is not a table of settings")
    had = trained.get("optim")
    if "optim" in chosen and isinstance(had, dict) and had.get("name") != plain["optim"]["name"]:
        raise ConfigError(
            "optim",
            f"the checkpoint holds the states of {had.get('name')}, not of {plain['optim']['name']}",
            "leave optim out, and set optim.lr and the like",
        )
    _close_doors(sections, plain, chosen, saved)
    try:
        inherited = OmegaConf.merge(OmegaConf.structured(configuration()), plain | sections)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise Refused(saved, f"{f'{key}: ' if key else ''}{str(error).splitlines()[0][:200]}") from None
    for override in asked:
        if override.key_or_group.split(".")[0] in INHERITED and "." in override.key_or_group:
            OmegaConf.update(inherited, override.key_or_group, override.value())
    _check_ranks(inherited, chosen, saved)
    return inherited  # type: ignore[return-value]


def _close_doors(sections: dict[str, Any], plain: dict[Any, Any], chosen: set[str], saved: Path) -> None:
    """What opens a door is as the user has it. Raises ConfigError where the source had one open and the user is silent.

    Going on in silence would be another experiment than the one that was trained.
    """
    for key, opens in doors().items():
        section, _, name = key.partition(".")
        if section not in sections or name not in sections[section]:
            continue
        value, own = sections[section][name], plain[section][name]
        if key not in chosen and opens(value) and not opens(own):
            words = str(value).lower() if isinstance(value, bool) else value
            raise ConfigError(
                key, f"{saved} has {words!r}, which lets in code that comes with it",
                f"set {key}={words} if you trust it, {key}={str(own).lower()} to go on without",
            )  # fmt: skip
        if opens(value) or opens(own):
            sections[section][name] = own


def _check_ranks(cfg: Any, chosen: set[str], saved: Path) -> None:
    """Raises ConfigError where the source alone asks for more ranks than anybody starts by chance."""
    try:
        world = int(cfg.sp.size) * int(cfg.dp.size)
    except (ValueError, TypeError):
        return  # said by `config.check`
    if world > MOST_RANKS and not chosen & {"sp.size", "dp.size"}:
        raise ConfigError("dp.size", f"{saved} asks for {world} ranks", "set sp.size and dp.size yourself")
