"""docs/claims.md: what is said of DeepSpeed Ulysses, and what a run of `experiment=claims` has measured.

    python run.py experiment=claims hydra.run.dir=outputs/claims
    python benchmarks/claims.py outputs/claims

Writes docs/claims.md and its pictures in docs/images. Nothing in them is typed in but the sentences themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from ulysses_exp.layout import Layout  # noqa: E402
from ulysses_exp.report.markdown import escape  # noqa: E402
from ulysses_exp.report.pictures import Picture, draw, png  # noqa: E402
from ulysses_exp.report.runs import find  # noqa: E402
from ulysses_exp.stages.claims.cell import HOLDS, VERDICTS  # noqa: E402
from ulysses_exp.stages.claims.layouts import in_words  # noqa: E402
from ulysses_exp.stages.claims.sentences import CLAIMS, FAMILIES, SIDES  # noqa: E402

FINDINGS = ROOT / "docs" / "findings.md"


def document(results: dict[str, Any], pictures: dict[str, Picture]) -> str:
    """The page of `results`, the content of a results.json; `pictures` by claim family."""
    stage = results["stages"]["claims"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if name != "ulysses-exp")
    day = time.strftime("%Y-%m-%d", time.gmtime(results["started"]))
    layouts = [Layout.parse(name) for name in stage["C1"]["here"]["cells"]]
    lines = [
        "# Ten claims, measured",
        "",
        f"Measured on {day} with {versions} on {results['device']}, model {escape(results['model']['name'])} "
        f"({results['model']['parameters']:,} parameters), in {results['stages']['claims']['seconds']:.0f} s. Nothing "
        "below is typed in but the sentences of the claims; `python run.py experiment=claims` measures them anew, and "
        "`python benchmarks/claims.py RUN_FOLDER` writes this page. With a model of your own:",
        "",
        "```sh",
        "python run.py experiment=claims model=hub model.name_or_path=PATH_OR_NAME",
        "```",
        "",
        "Sequence parallelism lets several processes (*ranks*, one a GPU) work on one sequence: each holds a part of "
        "its tokens, and for attention they exchange tokens for heads by *all-to-alls*. DeepSpeed Ulysses does so for "
        "models of Hugging Face transformers. *sp* is how many ranks share a sequence; *ZeRO* 0 to 3 is what DeepSpeed "
        "splits among the ranks beside: nothing, optimizer states, gradients too, weights too. What is said of its "
        "evaluation and its checkpoints is held here against what happens, on two sides:",
        "",
        "- **upstream**: DeepSpeed and transformers alone, put together as their documentation says.",
        "- **here**: through this project, whose own attention over whole sequences takes the place of the original.",
        "",
        f"Each is measured at sp {', '.join(map(str, sorted({layout.sp for layout in layouts})))} and ZeRO "
        f"{', '.join(map(str, sorted({layout.zero for layout in layouts})))}; `sp2-dp1-z3` is sp 2, one such group, "
        "ZeRO 3. The right answer is always that of the unpatched model in a single process.",
        "",
        "| | claim | upstream | here |",
        "| --- | --- | --- | --- |",
    ]
    for claim in CLAIMS:
        verdicts = " | ".join(_where(stage[claim.key][side]["cells"], layouts) for side in SIDES)
        lines.append(f"| [{claim.key}](#{claim.key.lower()}) | {escape(claim.sentence)} | {verdicts} |")
    for family in FAMILIES:
        lines += ["", f"## {family.capitalize()}"]
        for claim in (claim for claim in CLAIMS if claim.family == family):
            lines += ["", f"### {claim.key}", "", escape(claim.sentence), ""]
            lines += ["| | where | verdict | measured | if what, or what happens instead |"]
            lines += ["| --- | --- | --- | --- | --- |"]
            for side in SIDES:
                lines += _rows(side, stage[claim.key][side]["cells"], layouts)
        if (picture := pictures.get(family)) is not None:
            lines += ["", escape(picture.caption), "", f"![{picture.title}](images/{picture.name}.png)"]
    return "\n".join(lines) + "\n"


def _where(cells: dict[str, Any], layouts: list[Layout]) -> str:
    """Which verdict where, e.g. `**does not hold**: sp 2, 4; holds: sp 1`."""
    by_verdict = {v: [layout for layout in layouts if cells[layout.name]["verdict"] == v] for v in VERDICTS}
    found = [
        (f"**{verdict}**" if verdict != HOLDS else verdict) + ("" if len(those) == len(layouts) else f": {place}")
        for verdict, those in by_verdict.items()
        if those and (place := in_words(those, layouts))
    ]
    return "; ".join(found)


def _rows(side: str, cells: dict[str, Any], layouts: list[Layout]) -> list[str]:
    """A row for all layouts that have the same verdict and figure; further words are those of the last of them."""
    groups: dict[tuple[str, str], list[Layout]] = {}
    for layout in layouts:
        cell = cells[layout.name]
        groups.setdefault((cell["verdict"], cell["figure"]), []).append(layout)
    found = []
    for (verdict, figure), those in groups.items():
        cell = cells[those[-1].name]
        why = escape(cell.get("why", ""))
        if any(cells[layout.name].get("why") != cell.get("why") for layout in those):
            why = f"e.g. {those[-1].name}: {why}"
        if cell.get("finding"):
            why += f" ([finding {cell['finding']}](findings.md#{anchor(cell['finding'])}))"
        found.append(f"| {side} | {in_words(those, layouts)} | {verdict} | {escape(figure)} | {why} |")
    return found


def anchor(number: int) -> str:
    """Of a finding's heading, as GitHub makes it."""
    heading = next(line for line in FINDINGS.read_text().splitlines() if line.startswith(f"## {number}. "))
    text = heading.removeprefix("## ").lower()
    return "".join(c for c in text.replace(" ", "-") if c.isalnum() or c in "-_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run of experiment=claims")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    results = json.loads((arguments.run / "results.json").read_text())
    drawn = {picture.name: picture for picture in draw(find([arguments.run]))}
    names = ("claims_communication", "claims_memory", "claims_opening")
    pictures = {family: drawn[name] for family, name in zip(FAMILIES, names, strict=True) if name in drawn}
    (arguments.out / "images").mkdir(parents=True, exist_ok=True)
    for picture in pictures.values():
        (arguments.out / "images" / f"{picture.name}.png").write_bytes(png(picture))
    (arguments.out / "claims.md").write_text(document(results, pictures))


if __name__ == "__main__":
    main()
