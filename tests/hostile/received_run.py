"""A run folder as one receives it: a real checkpoint of a tiny model, and the configuration that goes with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ulysses_exp import config
from ulysses_exp.config.received import sources
from ulysses_exp.config.received.manifest import Manifest

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))  # checkpoint_ranks, tiny_engine

STEP = Path("checkpoints/step1")
CONFIG = Path(".hydra/config.yaml")


def composed(*overrides: str) -> DictConfig:
    """What Hydra makes of a command line."""
    from ulysses_exp.config.composing import composed as compose

    return compose(list(overrides))[0]


def make_checkpoint(folder: Path) -> None:
    """In a rank: one step of training, saved."""
    from tiny_engine import engine, steps

    from ulysses_exp.layout import REFERENCE
    from ulysses_exp.rank import checkpoints

    with engine(REFERENCE) as made:
        steps(made, REFERENCE, 0, 1)
        checkpoints.save(made, folder, layout=REFERENCE, step=1, state={})


def open_checkpoint(folder: Path) -> str:
    """In a rank: what loading it says."""
    from tiny_engine import engine

    from ulysses_exp.layout import REFERENCE
    from ulysses_exp.rank import checkpoints

    with engine(REFERENCE, seed=1) as made:
        try:
            checkpoints.load(made, folder, layout=REFERENCE)
        except checkpoints.CheckpointError as error:
            return str(error)
    return "loaded"


def make(folder: Path) -> None:
    """The run folder. Starts a rank."""
    from checkpoint_ranks import run

    run(1, make_checkpoint, folder / STEP)
    cfg = composed("sp.size=1", "zero.stage=0", "train.seq_len=64", "stages=[train]")
    (folder / CONFIG).parent.mkdir()
    OmegaConf.save(cfg, folder / CONFIG, resolve=True)
    losses = {"stages": {"train": {"continuation_loss": [1.0, 2.0, 3.0]}}}
    (folder / "results.json").write_text(json.dumps(losses))


class Checked:
    """The parent's check of `stages=[eval] checkpoint.source=...`, without composing anew for each source."""

    def __init__(self) -> None:
        self._cfg = composed("stages=[eval]", "checkpoint.source=-", "device=cpu")

    def __call__(self, source: Path, *overrides: str) -> config.Config:
        """Raises ConfigError."""
        cfg = OmegaConf.merge(self._cfg, OmegaConf.from_dotlist([*overrides]))
        cfg.checkpoint.source = str(source)
        return config.resolve(sources.inherit(cfg, list(overrides)))


def forge(folder: Path, **entries: object) -> None:
    """Other entries in the manifest of a run, under a checksum that is right."""
    manifest = Manifest.read(folder / STEP)
    for name, value in entries.items():
        setattr(manifest, name, value)
    manifest.write(folder / STEP)
