"""Every layout against the single process, for every kind of model, data and batch that has fooled somebody.

    python benchmarks/parity.py [--variants 'gqa;packed'] [--optimizers sgd,adamw] [--layouts sp2-dp1-z0,sp4-dp1-z3]
    python benchmarks/parity.py --precision bf16 ...

Writes benchmarks/results/parity.{json,md}, in bf16 parity_bf16.{json,md}. A cell is the largest relative
difference over the steps of loss, gradient norm and any weight tensor (largest absolute difference over its largest
weight).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ulysses_exp.config import Config, resolve  # noqa: E402
from ulysses_exp.config.composing import composed  # noqa: E402
from ulysses_exp.launch import RankFailure, Task  # noqa: E402
from ulysses_exp.launch.local import LocalRanks  # noqa: E402
from ulysses_exp.layout import REFERENCE, Layout  # noqa: E402
from ulysses_exp.stages.parity.comparison import SCALAR_NOISE, WEIGHT_NOISE, by_noise, compare  # noqa: E402

LAYOUTS = [Layout(sp, dp, zero) for zero in range(4) for sp in (1, 2, 4) for dp in (1, 2, 4) if sp * dp <= 4]

VARIANTS: dict[str, list[str]] = {
    "gqa": [],
    "mha": ["model=tiny_llama_mha"],
    "mqa, KV replicated": ["model=tiny_llama_mqa"],
    "tied embeddings": ["model=tiny_llama_tied"],
    "packed": ["data=packed", "data.mean_document=40"],
    "ignored labels": ["data.ignore_labels=0.9"],
    "right padding": ["data.padding=right"],
    "left padding": ["data.padding=left"],
    "sliding window": ["model=tiny_mistral_window", "model.architecture.sliding_window=24"],
    "gemma 3, local and global layers": ["model=tiny_gemma3", "model.architecture.sliding_window=24"],
    "qwen 3": ["model=tiny_qwen3"],
    "gpt-oss, sinks": ["model=tiny_gpt_oss", "model.architecture.sliding_window=24"],
    "gemma 2, soft cap": ["model=tiny_gemma2", "model.architecture.sliding_window=24"],
    # its normalised values double a rounding error each step, in one process too (sp1-dp2 against sp1-dp1)
    "gemma 4, two head sizes": ["model=tiny_gemma4", "model.architecture.sliding_window=24", "parity.tolerance=2e-5"],
    "llama 4, chunks": ["model=tiny_llama4", "model.architecture.attention_chunk_size=24"],
    "deepseek v3, latent": ["model=tiny_deepseek_v3"],
    "gpt-2": ["model=tiny_gpt2"],
    "9 heads on 3 KV heads": ["model=tiny_llama_uneven"],
    "one micro step": ["train.global_batch_size=4", "train.micro_batch_size=MAX"],
    "clipping": ["optim.grad_clip=0.5"],
    # from 512 tokens on the backward works in blocks of 128 (attention/kernels/cpu_blocks.py); the last has 16 here
    "1,040 tokens": ["train.seq_len=1040"],
    "1,040 tokens, packed": ["train.seq_len=1040", "data=packed", "data.mean_document=800"],
    "small weights kept gathered": ["zero.param_persistence_threshold=100000"],  # DeepSpeed's default
}


def _heads(heads: int, kv_heads: int, *more: str) -> list[str]:
    """A model of so many query and KV heads of 16."""
    return [f"model.architecture.num_attention_heads={heads}", f"model.architecture.num_key_value_heads={kv_heads}",
            f"model.architecture.hidden_size={16 * heads}", *more]  # fmt: skip


#: Heads that the ranks do not divide, and fewer heads than ranks, each at ZeRO 0 to 3
UNEVEN = {
    "9 on 3 heads, sp 5": (_heads(9, 3, "train.seq_len=130"), 5),
    "14 on 2 heads, sp 4": (_heads(14, 2), 4),
    "28 on 4 heads, sp 8": (_heads(28, 4), 8),
    "5 on 1 heads, sp 8": (_heads(5, 1), 8),
    "4 on 2 heads, sp 8": (_heads(4, 2), 8),
    "4 on 2 heads, sp 8, packed": (_heads(4, 2, "data=packed", "data.mean_document=40"), 8),
}
VARIANTS |= {name: overrides for name, (overrides, _) in UNEVEN.items()}

# a threshold of 0: ZeRO 3 gathers and releases every tensor, of small models too
COMMON = ["train.seq_len=128", "train.global_batch_size=4", "parity.steps=3", "stages=[parity]", "device=cpu",
          "zero.param_persistence_threshold=0"]  # fmt: skip


def configuration(
    variant: str, optimizer: str, layout: Layout, exchange: str = "fused", precision: str = "fp32"
) -> Config:
    """The experiment of one cell. Without a variant that says otherwise the global batch of 4 accumulates."""
    extra = [o.replace("MAX", str(4 // layout.dp)) for o in VARIANTS[variant]]
    overrides = [*COMMON, f"optim={optimizer}", f"sp.size={layout.sp}", f"dp.size={layout.dp}",
                 f"zero.stage={layout.zero}", f"sp.exchange={exchange}",
                 f"train.precision={precision}", *extra]  # fmt: skip
    return resolve(composed(overrides)[0])


class Harness:
    """Runs cells on warm ranks; a reference is run once a variant and optimizer."""

    def __init__(self, folder: Path, precision: str = "fp32"):
        self.folder, self.ranks, self.precision = folder, LocalRanks(), precision
        self._references: dict[tuple[str, str, str], Path] = {}

    def cell(self, variant: str, optimizer: str, layout: Layout, exchange: str = "fused") -> dict[str, Any]:
        """The `parity` result of one layout."""
        config = configuration(variant, optimizer, layout, exchange, self.precision)
        reference = self._reference(variant, optimizer, exchange, self.precision)
        full = None
        if by_noise(config):
            folder = self._reference(variant, optimizer, exchange, "fp32")
            full = (folder, _result(folder))
        try:
            ours = self._trajectory("layout", config)
        except RankFailure as error:
            return {"status": "failed", "reason": str(error)}
        return compare(config, reference, ours, (_result(reference), _result(ours)), full)

    def _reference(self, variant: str, optimizer: str, exchange: str, precision: str) -> Path:
        key = (variant, optimizer, precision)
        if key not in self._references:
            one = configuration(variant, optimizer, REFERENCE, exchange, precision)
            self._references[key] = self._trajectory(f"{len(self._references)}-reference", one)
        return self._references[key]

    def _trajectory(self, name: str, config: Config) -> Path:
        task = Task(name, config, ("trajectory",), self.folder)
        self.ranks.run(task)
        return task.results


def _result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "trajectory.json").read_text())
    return found


def largest(result: dict[str, Any]) -> float:
    """The one figure of a cell."""
    if "max_rel_loss_diff" not in result:
        return float("nan")
    return max(result["max_rel_loss_diff"], result["max_rel_grad_norm_diff"], result["max_rel_weight_diff"])


def main() -> None:
    """Runs the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by ;")
    parser.add_argument("--optimizers", default="sgd,adamw")
    parser.add_argument("--exchange", default="fused")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--layouts", default=",".join(layout.name for layout in LAYOUTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), arguments.precision)
        layouts = [Layout.parse(name) for name in arguments.layouts.split(",")]
        name = "parity.json" if arguments.precision == "fp32" else "parity_bf16.json"
        for optimizer in arguments.optimizers.split(","):
            for variant in arguments.variants.split(";"):
                own = [Layout(UNEVEN[variant][1], 1, zero) for zero in range(4)] if variant in UNEVEN else layouts
                for layout in own:
                    result = harness.cell(variant, optimizer, layout, arguments.exchange)
                    cells.append({"optimizer": optimizer, "variant": variant, "layout": layout.name, **result})
                worst = max(cells[-len(own) :], key=lambda c: (largest(c) != largest(c), largest(c)))
                print(f"{optimizer} {variant}: worst {worst['layout']} {largest(worst):.1e}", flush=True)
                write(arguments.out / name, cells, arguments.exchange, arguments.precision)


def write(path: Path, cells: list[dict[str, Any]], exchange: str, precision: str) -> None:
    """The cells and their table; cells of other variants and optimizers, made with the same versions, stay."""
    versions = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    same = {"common": COMMON, "machine": platform.platform(), "versions": versions, "exchange": exchange}
    before = json.loads(path.read_text()) if path.exists() else {}
    done = {(c["optimizer"], c["variant"], c["layout"]): c for c in cells}
    if all(before.get(key) == value for key, value in same.items()):
        done = {(c["optimizer"], c["variant"], c["layout"]): c for c in before["cells"]} | done
    order = {name: i for i, name in enumerate(VARIANTS)}
    kept = sorted(done.values(), key=lambda c: (c["optimizer"] != "sgd", order[c["variant"]]))
    report = {**same, "cells": kept}
    path.write_text(json.dumps(report, indent=1))
    path.with_suffix(".md").write_text(markdown(report) if precision == "fp32" else markdown_of_bf16(report))


def markdown(report: dict[str, Any]) -> str:
    """A row a variant; the worst of the 24 layouts in each."""
    lines = [
        "# Parity with a single process",
        "",
        "fp32, 3 steps of 4 sequences of 128 tokens where no other length is named, 24 layouts (sp, dp in 1, 2, 4 with",
        "sp x dp <= 4; ZeRO 0 to 3; at ZeRO 3 every tensor is gathered and released, small ones too, but in the last",
        f"variant), exchange {report['exchange']}; {report['versions']}.",
        "Largest relative difference over layouts and steps.",
        "With SGD every figure is held to 1e-6, Gemma 4's to 2e-5 (one process with other sums differs as much)."
        " With AdamW the losses are, to 1e-5: its update g / sqrt(v) turns the",
        "rounding of a gradient that is nearly zero into a step of the full rate, in the parameter named last.",
        "",
        "| optimizer | variant | cells that hold | loss | gradient norm | weights | worst layout, parameter |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for optimizer, variant in dict.fromkeys((c["optimizer"], c["variant"]) for c in report["cells"]):
        rows = [c for c in report["cells"] if (c["optimizer"], c["variant"]) == (optimizer, variant)]
        done = [c for c in rows if "max_rel_loss_diff" in c]
        good = [c for c in done if (c["status"] == "ok" if optimizer == "sgd" else c["max_rel_loss_diff"] <= 1e-5)]
        worst = max(done, key=largest)
        place = max(worst["rows"], key=lambda row: row["weight"])["parameter"]
        keys = ("max_rel_loss_diff", "max_rel_grad_norm_diff", "max_rel_weight_diff")
        figures = " | ".join(f"{max(c[k] for c in done):.1e}" for k in keys)
        lines.append(
            f"| {optimizer} | {variant} | {len(good)} of {len(rows)} | {figures} | {worst['layout']}, {place} |"
        )
    return "\n".join(lines) + "\n"


def markdown_of_bf16(report: dict[str, Any]) -> str:
    """A row a variant: differences to one process, as multiples of what bf16 makes of that process."""
    lines = [
        "# Parity with a single process in bf16",
        "",
        "`python benchmarks/parity.py --precision bf16`, with `--layouts` where a row has fewer than 24.",
        "",
        "3 steps of 4 sequences of 128 tokens where no other length is named; ZeRO 3 as in [parity.md](parity.md);",
        f"{report['versions']}. Each figure is the largest over layouts and steps of",
        "",
        "    |layout in bf16 - one process in bf16| / |one process in bf16 - one process in fp32|",
        "",
        f"and may be at most {WEIGHT_NOISE:g} for weights and {SCALAR_NOISE:g} for the other two. The denominator is",
        "the root mean square over the steps for loss and gradient norm, and the Euclidean norm of each weight tensor",
        "after each step; with AdamW, of all weights together.",
        "",
        "| optimizer | variant | cells that hold | loss | gradient norm | weights | worst layout, parameter |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for optimizer, variant in dict.fromkeys((c["optimizer"], c["variant"]) for c in report["cells"]):
        rows = [c for c in report["cells"] if (c["optimizer"], c["variant"]) == (optimizer, variant)]
        done = [c for c in rows if "max_noise_multiples" in c]
        good = [c for c in done if c["status"] == "ok"]
        worst = max(done, key=lambda c: c["max_noise_multiples"]["weight"])
        place = max(worst["rows"], key=lambda row: row["multiples"]["weight"])["multiples"]["parameter"]
        most = {key: max(c["max_noise_multiples"][key] for c in done) for key in ("loss", "grad_norm", "weight")}
        figures = " | ".join(f"{value:.2f}" for value in most.values())
        lines.append(
            f"| {optimizer} | {variant} | {len(good)} of {len(rows)} | {figures} | {worst['layout']}, {place} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
