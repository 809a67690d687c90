"""Causal attention of one rank on CPU, forward and backward: torch's kernel and its backward in blocks.

    python benchmarks/attention_cpu.py [--rounds 7]

One thread, no other program. The two run in turns; a figure is the median, a ratio the median of neighbouring turns.
Writes benchmarks/results/attention_cpu.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from ulysses_exp.model.attention import core  # noqa: E402
from ulysses_exp.model.attention.documents import Documents  # noqa: E402

#: Query heads, KV heads and their size: a rank of tiny_llama at sp 4 and at sp 2, and heads of larger models.
HEADS = ((2, 1, 16), (4, 2, 16), (4, 4, 64), (2, 1, 128))
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    plan = core.Plan(Documents(query.shape[0], query.shape[2]))
    return core.torchs(query, key, value, plan, core.Scores()).transpose(1, 2)


def seconds(attention: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor) -> float:
    began = time.perf_counter()
    torch.autograd.grad(attention(*tensors), tensors, gradient)
    return time.perf_counter() - began


def measure(heads: int, kv_heads: int, dim: int, tokens: int, rounds: int) -> dict[str, Any]:
    """q, k and v lie as the exchange leaves them: side by side, a row a token."""
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    parts = torch.randn(tokens, 1, sum(sizes)).split(sizes, dim=-1)
    tensors = [p.unflatten(-1, (-1, dim)).permute(1, 2, 0, 3).detach().requires_grad_() for p in parts]
    gradient = torch.randn(1, tokens, heads, dim).transpose(1, 2)
    turns = [(seconds(torchs, tensors, gradient), seconds(ours, tensors, gradient)) for _ in range(1 + rounds)][1:]
    low, middle, high = statistics.quantiles([b / a for a, b in turns], n=4)
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "tokens": tokens,
            "torch_s": statistics.median(a for a, _ in turns), "ours_s": statistics.median(b for _, b in turns),
            "ratio": middle, "quartiles": [low, high]}  # fmt: skip


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for shape in HEADS:
        for tokens in TOKENS:
            rows.append(measure(*shape, tokens, arguments.rounds))
            print(json.dumps(rows[-1]), flush=True)
    report = {"machine": processor(), "torch": version("torch"), "rounds": arguments.rounds, "rows": rows}
    (arguments.out / "attention_cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "attention_cpu.md").write_text(markdown(report))


def processor() -> str:
    """Name and size of the second-level cache, on which the result depends."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    return f"{names[0]}, {cache.read_text().strip() if cache.exists() else 'unknown'} of second-level cache"


def markdown(report: dict[str, Any]) -> str:
    """A row a length, a column a shape."""
    rows = {(r["heads"], r["kv_heads"], r["head_dim"], r["tokens"]): r for r in report["rows"]}
    shapes = " | ".join(f"{h} query and {kv} KV heads of {d}" for h, kv, d in HEADS)
    lines = [
        "# Causal attention on CPU, its backward in blocks",
        "",
        f"`python benchmarks/attention_cpu.py`: {report['machine']}; torch {report['torch']}, fp32, one thread, one "
        f"sequence, forward and backward. Ours over torch's `scaled_dot_product_attention`: the median of "
        f"{report['rounds']} neighbouring turns with their middle half, and torch's time. The outputs are equal bit "
        "for bit, the gradients to rounding (tests/attention/test_cpu_blocks.py).",
        "",
        f"| tokens | {shapes} |",
        "| ---: |" + " --- |" * len(HEADS),
    ]
    for tokens in TOKENS:
        cells = []
        for shape in HEADS:
            row = rows[(*shape, tokens)]
            low, high = row["quartiles"]
            cells.append(f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}) of {row['torch_s'] * 1e3:,.1f} ms")
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
