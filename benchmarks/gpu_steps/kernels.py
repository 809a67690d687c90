"""Each attention kernel beside fp32 numbers of the CPU, and its time and memory at a length where they matter."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_steps.step import Row, Setting

if TYPE_CHECKING:
    from torch import Tensor

    from gpu_steps.attention_kernels import Attend
    from ulysses_exp.model.attention.documents import Documents

CHOICE = "choice"  # the part that asks which kernel sdpa takes
RIGHT = {"float32": 1e-4, "bfloat16": 3e-2}  # error over the largest number; a wrong mask is off by about one


@dataclass(frozen=True)
class Case:
    """`documents`: in how many a sequence is; `window`: tokens over that, 0 for none."""

    name: str
    heads: int
    kv_heads: int
    documents: int = 1
    window: int = 0


CASES = (
    Case("plain", 8, 8),
    Case("plain, GQA", 8, 2),
    Case("packed, GQA", 8, 2, documents=256),
    Case("windows, GQA", 8, 2, window=8),
    Case("packed, windows, GQA", 8, 2, documents=16, window=64),
)


def parts(setting: Setting) -> list[str]:
    from gpu_steps.attention_kernels import NAMES

    return setting.pick([*NAMES[:1], CHOICE, *NAMES[1:]], [";".join([*NAMES, CHOICE])])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: names of kernels, or CHOICE."""
    from gpu_steps.attention_kernels import Missing, kernel, no_compiler_limit

    for name in part.split(";"):
        if name == CHOICE:
            yield from choices(setting)
            continue
        try:
            attend = kernel(name)
        except Missing as missing:
            yield {"kernel": name, "result": str(missing)}
            continue
        for dtype in ("bfloat16", "float32"):
            refused: dict[str, list[str]] = {}  # by reason, the cases
            for case in CASES:
                with no_compiler_limit():
                    row = one(setting, attend, dtype, case)
                if reason := row.pop("refused", None):
                    refused.setdefault(reason, []).append(case.name)
                else:
                    yield {"kernel": name, "type": dtype, "case": case.name, **row}
            for reason, cases in refused.items():
                which = "all" if len(cases) == len(CASES) else "; ".join(cases)
                yield {"kernel": name, "type": dtype, "case": which, "result": f"refused: {reason}"}


def one(setting: Setting, attend: Attend, dtype: str, case: Case) -> Row:
    """Errors at a short length, time and memory at a long one; `refused` where the kernel does not do this."""
    import torch

    row: Row = {}
    try:
        row |= errors(setting, attend, dtype, case, setting.pick(2048, 128))
        row |= cost(setting, attend, dtype, case, setting.pick(32768, 256))
    except torch.OutOfMemoryError:
        row["result"] = row.get("result", "") + ", out of memory at the long one"
    except Exception as error:
        said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:120]
        # what a kernel does not do it refuses in one of these, and before it computes anything
        refuses = isinstance(error, (RuntimeError, ValueError)) and "CUDA error" not in said and "result" not in row
        row["refused" if refuses else "trouble"] = said
    return row


def errors(setting: Setting, attend: Attend, dtype: str, case: Case, tokens: int) -> Row:
    """Largest error of the output and of each gradient, over the largest number of the right one."""
    import torch

    from gpu_steps.attention_kernels import core_sdpa

    q, k, v, gradient = inputs(case, tokens, setting.pick(128, 16), dtype)
    documents, window = sequences(case, tokens)
    right = forward_backward(core_sdpa, [x.float() for x in (q, k, v)], gradient.float(), documents, window)
    found = forward_backward(
        attend, [x.to(setting.device) for x in (q, k, v)], gradient.to(setting.device), documents, window
    )
    off = [
        float(torch.linalg.vector_norm(x.float().cpu() - y, torch.inf) / torch.linalg.vector_norm(y, torch.inf))
        for x, y in zip(found, right, strict=True)
    ]
    worst = max(off) if all(x == x for x in off) else float("nan")
    row: Row = {"result": "right" if worst < RIGHT[dtype] else "WRONG"}
    row |= dict(zip(("error", "of dq", "of dk", "of dv"), off, strict=True))
    if row["result"] != "right":
        row["trouble"] = f"an error of {worst:.1e}"
    return row


def cost(setting: Setting, attend: Attend, dtype: str, case: Case, tokens: int) -> Row:
    """Time and memory of forward and backward, memory beyond inputs, output and gradients."""
    import torch

    device = setting.device
    q, k, v, gradient = (x.to(device) for x in inputs(case, tokens, setting.pick(128, 16), dtype))
    documents, window = sequences(case, tokens)
    took, used = [], None
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        forward_backward(attend, [q, k, v], gradient, documents, window)
        if device == "cuda":
            torch.cuda.synchronize()
            used = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in (q, q, k, v))
        took.append(time.perf_counter() - began)
    rate = flops(case, documents, q, window) / min(took) / 1e12
    return {"long tokens": tokens, "long_s": min(took), "more_bytes": used, "TFLOP/s": rate}


def flops(case: Case, documents: Documents, q: Tensor, window: int | None) -> float:
    """Of forward and backward, visible pairs alone: 2 products there, 5 back (FlashAttention 2's count)."""
    from ulysses_exp.rank.metrics.flops import pairs

    tokens, dim = q.shape[2], q.shape[3]
    lengths = [s.stop - s.start for s in documents.rows[0]] if documents.rows else [tokens]
    return 3.5 * 4 * sum(pairs(length, window) for length in lengths) * case.heads * dim


def forward_backward(
    attend: Attend, tensors: list[Tensor], gradient: Tensor, documents: Documents, window: int | None
) -> list[Tensor]:
    """[output, dq, dk, dv]."""
    import torch

    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves, documents, window)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def inputs(case: Case, tokens: int, dim: int, dtype: str) -> list[Tensor]:
    """q, k, v [1, heads, tokens, dim] and the output's gradient [1, tokens, heads, dim], the same for every kernel.

    q, k and v lie in memory as the exchange leaves them, a token after the other.
    """
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    made = [torch.randn(1, tokens, h, dim).to(kind) for h in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    return [*(x.transpose(1, 2) for x in made[:3]), made[3]]


def sequences(case: Case, tokens: int) -> tuple[Documents, int | None]:
    """Documents of lengths that differ, and the window in tokens."""
    from ulysses_exp.model.attention.documents import Documents, Segment

    window = tokens // case.window if case.window else None
    number = min(case.documents, tokens // 4)
    if number == 1:
        return Documents(1, tokens), window
    size = tokens // number
    edges = [0, *(n * size + (n % 2) for n in range(1, number)), tokens]
    row = tuple(Segment(a, b) for a, b in itertools.pairwise(edges))
    return Documents(1, tokens, (row,)), window


def choices(setting: Setting) -> Iterator[Row]:
    """The kernel that sdpa takes by itself; math makes scores of n x n."""
    import torch
    from torch.nn.attention import SDPBackend

    tokens, dim = setting.pick(8192, 128), setting.pick(128, 16)
    for dtype in ("bfloat16", "float32"):
        for case in CASES[:2]:
            for masked in (False, True):
                q, k, v, _ = (x.to(setting.device) for x in inputs(case, tokens, dim, dtype))
                mask = torch.ones(tokens, tokens, dtype=torch.bool, device=setting.device).tril() if masked else None
                chosen = torch._fused_sdp_choice(
                    q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=case.heads != case.kv_heads
                )
                yield {
                    "kernel": "sdpa's choice",
                    "type": dtype,
                    "case": case.name + (", with a mask" if masked else ""),
                    "result": SDPBackend(chosen).name,
                }
