"""A sweep of 12 small jobs beside the same 12 jobs as separate launches of a bare script, and what either leaves.

    python benchmarks/sweep.py [--rounds 1] [--many 100] [--append]

The jobs: 1, 2 and 4 sequence-parallel ranks at ZeRO 0 to 3, tiny_llama, 5 steps of one sequence, training only. Once as
`python run.py -m sp.size=1,2,4 zero.stage=0,1,2,3`, which imports once and forks; once as 12 x `torchrun
peers/deepspeed_recipe.py`, DeepSpeed's tutorial recipe on the same weights and tokens, which writes no checkpoint (the
sweep writes one a job). Both cold, one after the other, alone on the machine. Then `--many` jobs of one rank as one
sweep. After each: processes that are left, and what is new in /dev/shm and in the temporary folder (TMPDIR).

Writes benchmarks/results/sweep.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed

ROOT = speed.ROOT
RECIPE = ROOT / "benchmarks" / "peers" / "deepspeed_recipe.py"
SPS, STAGES, STEPS, LENGTH = (1, 2, 4), (0, 1, 2, 3), 5, 256
TARGET = 0.25
#: In the environment of everything that a measured command starts, and so of every process that it leaves
MARK = "ULYSSES_EXP_BENCHMARK"


def watched(measured: Callable[[dict[str, str], Path], None]) -> dict[str, Any]:
    """Runs `measured(environment, folder)` in a temporary folder of its own.

    Returns:
        Its seconds, and what it left: processes, files in /dev/shm, entries of the temporary folder.
    """
    mark = uuid.uuid4().hex
    folder, temporary = (Path(tempfile.mkdtemp(prefix="sweep-benchmark-")) for _ in range(2))
    before = set(os.listdir("/dev/shm"))
    began = time.perf_counter()
    try:
        measured({**speed.environment(), MARK: mark, "TMPDIR": str(temporary)}, folder)
        seconds = time.perf_counter() - began
        time.sleep(2)  # multiprocessing's resource tracker removes semaphores after their owners have ended
        left = {
            "processes": processes_with(mark),
            "shared_memory": sorted(set(os.listdir("/dev/shm")) - before),
            "temporary": sorted(os.listdir(temporary)),
        }
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(temporary)
    return {"seconds": seconds, "left": left}


def processes_with(mark: str) -> list[str]:
    """Command lines of the living processes in whose environment `mark` is."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environ.read_bytes():
                found.append((environ.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # another user's, or gone
            continue
    return found


def sweep(*overrides: str) -> Callable[[dict[str, str], Path], None]:
    """`python run.py -m ...`; every job has to be ok."""

    def run(environment: dict[str, str], folder: Path) -> None:
        command = [sys.executable, str(ROOT / "run.py"), "-m", *overrides, *common()]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)

    return run


def common() -> list[str]:
    """What the jobs share."""
    return [f"train.seq_len={LENGTH}", f"train.steps={STEPS}", "train.global_batch_size=1", "stages=[train]",
            "optim.grad_clip=0", "optim.beta2=0.999", "device=cpu", "tracker.mode=disabled"]  # fmt: skip


def launches(environment: dict[str, str], folder: Path) -> None:
    """12 x torchrun. Weights and tokens are made beforehand (`prepared`)."""
    for sp in SPS:
        for zero in STAGES:
            job = json.loads((prepared() / "job.json").read_text()) | {"sp": sp, "zero": zero}
            (folder / "job.json").write_text(json.dumps(job))
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={sp}", "--master-addr=127.0.0.1",
                 "--master-port=29545", str(RECIPE), str(folder / "job.json"), str(folder / "result.json")],
                cwd=folder, env=environment, check=True, capture_output=True,
            )  # fmt: skip


_prepared: list[tempfile.TemporaryDirectory[str]] = []


def prepared() -> Path:
    """A folder with job.json, weights and tokens for the recipe, made once."""
    if not _prepared:
        _prepared.append(tempfile.TemporaryDirectory(prefix="sweep-benchmark-weights-"))
        folder = Path(_prepared[0].name)
        job = speed.peer_job(LENGTH, "sp1-dp1-z0", folder) | {"steps": STEPS}
        (folder / "job.json").write_text(json.dumps(job))
    return Path(_prepared[0].name)


def clean(left: dict[str, list[str]]) -> bool:
    return not any(left.values())


def measure(rounds: int, many: int, earlier: dict[str, Any]) -> dict[str, Any]:
    """Both ways in turn, then the long sweep; what is not measured now is taken over from `earlier`."""
    grid = sweep("sp.size=" + ",".join(map(str, SPS)), "zero.stage=" + ",".join(map(str, STAGES)))
    result: dict[str, Any] = {"rounds": [], **earlier}
    for number in range(len(result["rounds"]), len(result["rounds"]) + rounds):
        prepared()
        ways = {"sweep": grid, "torchrun": launches}
        taken = {name: watched(ways[name]) for name in (ways if number % 2 == 0 else reversed(ways))}
        ratio = taken["sweep"]["seconds"] / taken["torchrun"]["seconds"]
        result["rounds"].append({**taken, "ratio": ratio})
        print(json.dumps(result["rounds"][-1]), flush=True)
    if many:
        result["many"] = {"jobs": many, **watched(sweep("sp.size=1", f"seed=range({many})"))}
        print(json.dumps(result["many"]), flush=True)
    return result


def markdown(report: dict[str, Any]) -> str:
    """The comparison, a row a round, and what was left."""
    jobs, rounds = len(SPS) * len(STAGES), report["rounds"]
    ratio = statistics.median(r["ratio"] for r in rounds)
    lines = [
        "# A sweep beside separate launches", "",
        f"{report['machine']}; {report['versions']}. {jobs} jobs (sp {', '.join(map(str, SPS))} x ZeRO 0 to 3, "
        f"tiny_llama, {STEPS} steps of one sequence of {LENGTH} tokens), cold, alone on the machine, in turn: as one "
        f"`python run.py -m`, which also writes a checkpoint a job, and as {jobs} x `torchrun deepspeed_recipe.py`, "
        "which writes none.", "",
        "| round | sweep | torchrun | sweep / torchrun | left by the sweep |", "| --- | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for number, r in enumerate(rounds, 1):
        lines.append(
            f"| {number} | {r['sweep']['seconds']:.1f} s | {r['torchrun']['seconds']:.1f} s | {r['ratio']:.2f} "
            f"| {told(r['sweep']['left'])} |"
        )
    lines += ["", f"Median ratio {ratio:.2f}; target: at most {TARGET}."]
    if many := report.get("many"):
        lines += ["", f"One sweep of {many['jobs']} jobs of one rank, {STEPS} steps each: {many['seconds']:.0f} s, "
                  f"{many['seconds'] / many['jobs']:.2f} s a job; left: {told(many['left'])}."]  # fmt: skip
    lines += ["", "Left: processes started by the command (found by a mark in their environment), new files in "
              "/dev/shm and in `TMPDIR`, two seconds after its end."]  # fmt: skip
    return "\n".join(lines) + "\n"


def told(left: dict[str, list[str]]) -> str:
    """What is left, in words."""
    return "; ".join(f"{kind}: {', '.join(found)}" for kind, found in left.items() if found) or "nothing"


def main() -> int:
    """Measures and writes the table; 1 where the target is missed or something is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--many", type=int, default=100, help="jobs of the long sweep, 0: none")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--append", action="store_true", help="keep what the last call measured, add to it")
    arguments = parser.parse_args()
    target = arguments.out / "sweep.json"
    recorded = json.loads(target.read_text()) if arguments.append else {}
    earlier = {part: recorded[part] for part in ("rounds", "many") if part in recorded}
    from importlib.metadata import version

    report = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, gloo",
              "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
              **measure(arguments.rounds, arguments.many, earlier)}  # fmt: skip
    target.write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "sweep.md").write_text(markdown(report))
    kept = [r["sweep"]["left"] for r in report["rounds"]] + ([report["many"]["left"]] if "many" in report else [])
    return 0 if all(map(clean, kept)) and statistics.median(r["ratio"] for r in report["rounds"]) <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
