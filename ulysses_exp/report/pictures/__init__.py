"""The report's pictures, each drawn only where the runs have data for it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.figure import Figure

from ulysses_exp.report.pictures.agreement import evaluation, parity
from ulysses_exp.report.pictures.bars import costs, plan, step_split
from ulysses_exp.report.pictures.claims import communication as claims_communication
from ulysses_exp.report.pictures.claims import memory as claims_memory
from ulysses_exp.report.pictures.claims import opening as claims_opening
from ulysses_exp.report.pictures.curves import loss
from ulysses_exp.report.pictures.drawn import Drawn
from ulysses_exp.report.pictures.lengths import plan_grid
from ulysses_exp.report.pictures.matrix import reload
from ulysses_exp.report.pictures.scaling import longest, memory, throughput
from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import RC

_DPI = 130


@dataclass(frozen=True)
class Picture:
    """A drawn figure with the sentences that say what to see in it."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw(runs: list[Run]) -> list[Picture]:
    """Every picture that `runs` have data for."""
    drawn = []
    with _style():
        for name, title, caption, painter in _PICTURES:
            picture = painter(runs)
            if picture is not None:
                drawn.append(Picture(name, title, f"{caption} {picture.note}".strip(), picture.figure))
    return drawn


def names() -> list[str]:
    """The names that pictures can have, in the order of the report."""
    return [name for name, *_ in _PICTURES]


def png(picture: Picture) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    with _style():
        picture.figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def svg(picture: Picture) -> str:
    """The picture as an SVG element, its ids made its own, so that several share a page."""
    file = io.StringIO()
    with _style():
        picture.figure.savefig(
            file, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{picture.name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{picture.name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.title)}" ', 1)


@contextmanager
def _style() -> Iterator[None]:
    """Ours, whatever the user's matplotlibrc says. A name in a script that the font lacks is no trouble: browsers show
    it, PNG files show boxes."""
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


_PICTURES: tuple[tuple[str, str, str, Callable[[list[Run]], Drawn | None]], ...] = (
    (
        "throughput",
        "Throughput",
        "Tokens of all ranks together, each counted once, warm-up steps left out.",
        throughput,
    ),
    (
        "memory",
        "Peak memory",
        "The worst rank's peak; on CPU that of its whole process, some 300 MiB of imported libraries included. Dotted: "
        "what sharding everything perfectly over sp would give.",
        memory,
    ),
    (
        "costs",
        "Memory and time",
        "At one sp and one length. Memory on CPU is that of the whole process, some 300 MiB of imported libraries "
        "included; warm-up steps are left out of the time.",
        costs,
    ),
    (
        "longest",
        "Longest sequence",
        "Found by trying, in a limited memory of each rank. Dotted: in proportion to sp.",
        longest,
    ),
    (
        "loss",
        "Training loss",
        "Runs that differ only in their layout must draw one line. Where there are several, the lower part shows how "
        "far each is from the first; a difference of exactly zero is drawn at 0.",
        loss,
    ),
    (
        "eval",
        "Evaluation: SP bypass beside SP",
        "Left: how much the two results differ. Right: their speed, and how many all-to-all calls each made.",
        evaluation,
    ),
    (
        "reload",
        "Reload across layouts",
        "Each pair with its routes and their times. A route that fails gives the pair its colour. Grey: not tried.",
        reload,
    ),
    ("step_split", "Step time", "Where the time of an optimizer step goes.", step_split),
    (
        "parity",
        "Parity",
        "Against one process without ZeRO over the same tokens. A difference of exactly zero is drawn at 0.",
        parity,
    ),
    (
        "claims_communication",
        "Claims: what evaluation and training do",
        "C1: eval makes no exchange; C2: nor does the class; C3: the training flag decides; C4: Trainer's logits are "
        "right; C10: gradients are true. Upstream: DeepSpeed and transformers alone.",
        claims_communication,
    ),
    (
        "claims_memory",
        "Claims: what a rank holds",
        "The rank that holds most. Weights between two uses, gradients before the step, optimizer states with fp32 "
        "masters, activations that a forward keeps for its backward.",
        claims_memory,
    ),
    (
        "claims_opening",
        "Claims: who opens which checkpoint",
        "Weights and optimizer states, by load_checkpoint() upstream and by the portable format here.",
        claims_opening,
    ),
    ("plan", "Plan", "Predicted without running the model, by kind of memory.", plan),
    (
        "plan_grid",
        "Which layouts fit which length",
        "Predicted without running the model: a layout fits every length that its bar reaches.",
        plan_grid,
    ),
)
