"""This project, DeepSpeed's tutorial recipe and Hugging Face accelerate on the same model, tokens, layout and steps.

    python benchmarks/speed.py [--lengths 512,2048,8192] [--rounds 2] [--layout sp4-dp1-z2] [--programs ours,recipe]

A round starts every program, one after the other, alone on the machine. Then all are held (SIGSTOP) and go on in turns
of a second or a step, always from the end of a step to the end of a step: what else the machine does, and how fast its
owner lets it be, comes to all of them alike. A figure is the median over turns, a ratio that of neighbouring turns,
its spread the middle half of them. Writes benchmarks/results/speed.{json,md,png}.
The losses have to agree (AdamW at sp > 1 hides upstream's gradient scale in them, see docs/findings.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ulysses_exp.report.style import COLOURS, HATCHES, RC, figure  # noqa: E402
from ulysses_exp.report.units import of_seconds  # noqa: E402

OURS = {"ours": [], "ours compiled": ["train.compile=true"]}
ALONE = "torch's attention alone"
PEERS = {"recipe": "deepspeed_recipe.py", "accelerate": "accelerate_sp.py", ALONE: "attention_alone.py"}
NAMES = (*OURS, *PEERS)
UNMEASURED = 2
COMPARED = 10  # first steps, whose losses are compared


def steps_a_turn(length: int) -> int:
    """Optimizer steps of a turn: a second of them, at least one."""
    return max(1, 2_048 // length)


def turns_at(length: int) -> int:
    """Turns of each program in a round."""
    return 16 if length <= 2_048 else 8


def steps_at(length: int) -> int:
    """Optimizer steps of a run."""
    return UNMEASURED + turns_at(length) * steps_a_turn(length)


def overrides(length: int, layout: str) -> list[str]:
    """Our side of the comparison as a command line; the peers get the same in their own form."""
    from ulysses_exp.layout import Layout

    at = Layout.parse(layout)
    return [f"sp.size={at.sp}", f"dp.size={at.dp}", f"zero.stage={at.zero}", f"train.seq_len={length}",
            f"train.steps={steps_at(length)}", "train.global_batch_size=1", "optim.weight_decay=0", "optim.beta2=0.999",
            "optim.grad_clip=0", "stages=[train]", "device=cpu", "tracker.mode=disabled",
            f"train.unmeasured_steps={UNMEASURED}"]  # fmt: skip


def peer_job(length: int, layout: str, folder: Path) -> dict[str, Any]:
    """Writes initial weights and tokens of our run; returns the peers' job.json."""
    from ulysses_exp.config import resolve
    from ulysses_exp.config.composing import composed
    from ulysses_exp.model import build as models
    from ulysses_exp.rank.data import load_corpus
    from ulysses_exp.rank.data.sequences import draw

    config = resolve(composed(overrides(length, layout))[0])
    model = models.build(config)
    model.save_pretrained(folder / "weights")
    corpus = load_corpus(config, model.config.vocab_size)
    drawn = [draw(config, corpus, "train", step) for step in range(steps_at(length))]
    tokens = np.stack([np.append(s.input_ids, s.labels[-1]) for s in drawn])[:, None]
    np.save(folder / "tokens.npy", tokens)
    at = config.layout
    return {"architecture": config.model.architecture, "weights": str(folder / "weights"),
            "tokens": str(folder / "tokens.npy"), "sp": at.sp, "dp": at.dp, "zero": at.zero, "lr": config.optim.lr,
            "optimizer": "adamw", "grad_clip": 0, "steps": steps_at(length), "precision": "fp32"}  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT)}  # fmt: skip


class Program:
    """A training that runs only while it is its turn. `progress` gets a line at the end of each step."""

    def __init__(self, command: list[str], folder: Path, progress: Path):
        self.progress = progress
        self.began = time.perf_counter()
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT
            )

    def steps(self) -> int:
        return self.progress.read_bytes().count(b"\n") if self.progress.exists() else 0

    def wait_for(self, step: int) -> float:
        """Waits for the end of `step`; returns time.perf_counter() then."""
        while self.steps() < step:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.002)
        return time.perf_counter()

    def turn(self, steps: int) -> float:
        """Goes on for so many steps; returns the seconds of one."""
        target = self.steps() + steps
        began = time.perf_counter()
        self.signal(signal.SIGCONT)
        seconds = self.wait_for(target) - began
        self.signal(signal.SIGSTOP)
        return seconds / steps

    def signal(self, number: int) -> None:
        """To the launcher and all its ranks."""
        try:
            for process in [self.process, *psutil.Process(self.process.pid).children(recursive=True)]:
                process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def start(name: str, length: int, layout: str, job: dict[str, Any], folder: Path) -> Program:
    """`name`, from a cold command."""
    folder.mkdir()
    if name in OURS:
        command = [str(ROOT / "run.py"), *overrides(length, layout), *OURS[name], f"hydra.run.dir={folder}/run"]
        return Program(command, folder, folder / "run" / "metrics.jsonl")
    progress = folder / "progress"
    (folder / "job.json").write_text(json.dumps({**job, "progress": str(progress)}))
    program, port = ROOT / "benchmarks/peers" / PEERS[name], 29544 + list(PEERS).index(name)
    torchrun = ["torch.distributed.run", f"--nproc-per-node={job['sp'] * job['dp']}", "--master-addr=127.0.0.1"]
    command = ["-m", *torchrun, f"--master-port={port}", str(program), f"{folder}/job.json", f"{folder}/result.json"]
    return Program(command, folder, progress)


def result(name: str, folder: Path) -> dict[str, Any]:
    """Losses and peak memory of a program that has ended."""
    if name not in OURS:
        return json.loads((folder / "result.json").read_text())
    train = json.loads((folder / "run" / "results.json").read_text())["stages"]["train"]
    return {"loss": train["loss"], "peak_memory_bytes": train["peak_memory_bytes"]["per_rank"]}


def run_round(
    programs_named: tuple[str, ...], length: int, layout: str, job: dict[str, Any], folder: Path, backwards: bool
) -> dict[str, Any]:
    """Every program once, from its start to its end; by name: times of its turns, its start and its results."""
    names = programs_named[:: -1 if backwards else 1]
    folders = {name: folder / "".join(c if c.isalnum() else "-" for c in name) for name in names}
    programs: dict[str, Program] = {}
    cells: dict[str, Any] = {}
    try:
        for name in names:
            program = programs[name] = start(name, length, layout, job, folders[name])
            cells[name] = {"time_to_first_step_s": program.wait_for(1) - program.began, "step_time_s": []}
            program.wait_for(UNMEASURED)
            program.signal(signal.SIGSTOP)
        for number in range(turns_at(length)):
            for name in names[:: -1 if number % 2 else 1]:
                cells[name]["step_time_s"].append(programs[name].turn(steps_a_turn(length)))
        for name in names:
            programs[name].signal(signal.SIGCONT)
            if programs[name].process.wait(120):
                raise RuntimeError(f"{name}:\n{programs[name].log.read_text()[-3000:]}")
            cells[name] |= {k: v for k, v in result(name, folders[name]).items() if k not in cells[name]}
    finally:
        for program in programs.values():
            program.signal(signal.SIGKILL)
            program.process.wait()
    return cells


def warm_start(length: int, layout: str, folder: Path) -> float:
    """Seconds from the start of a sweep's later job to the end of its first step: what the second layout costs."""
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "-m", *overrides(length, layout), "seed=0,1,2", "train.steps=3",
         f"hydra.sweep.dir={folder}/warm"],
        cwd=folder, check=True, capture_output=True, env=environment(),
    )  # fmt: skip
    jobs = sorted((json.loads(path.read_text()) for path in folder.glob("warm/**/results.json")),
                  key=lambda job: job["started"])  # fmt: skip
    return statistics.median(job["stages"]["train"]["first_step_finished"] - job["started"] for job in jobs[1:])


def spread(times: list[float], others: list[float]) -> dict[str, Any]:
    """Of the ratios of neighbouring turns."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, others, strict=True)], n=4)
    return {"median": middle, "quartiles": [low, high]}


def measure(names: tuple[str, ...], length: int, layout: str, rounds: int) -> dict[str, Any]:
    """One length: every program's times, memory and losses."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = peer_job(length, layout, folder)
        runs = []
        for number in range(rounds):
            (folder / f"round{number}").mkdir()
            place, backwards = folder / f"round{number}", bool(number % 2)
            runs.append(run_round(names, length, layout, job, place, backwards))
        warm = warm_start(length, layout, folder)
    row: dict[str, Any] = {
        "seq_len": length,
        "layout": layout,
        "turns": turns_at(length),
        "steps_a_turn": steps_a_turn(length),
        "warm_time_to_first_step_s": warm,
    }
    times = {name: [t for run in runs for t in run[name]["step_time_s"]] for name in runs[0]}
    for name in names:
        row[name] = {
            "step_time_s": statistics.median(times[name]),
            "turns_s": times[name],
            "over_this": {our: spread(times[our], times[name]) for our in OURS if our in names},
            "time_to_first_step_s": statistics.median(run[name]["time_to_first_step_s"] for run in runs),
            "peak_memory_bytes": max(max(run[name]["peak_memory_bytes"]) for run in runs),
        }
        if name != ALONE:
            losses = runs[0][name]["loss"][:COMPARED], runs[0]["ours"]["loss"][:COMPARED]
            row[name]["loss"] = losses[0]
            row[name]["max_rel_loss_diff"] = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    return row


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layout", default="sp4-dp1-z2")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--programs", default=",".join(NAMES), help="out of " + ", ".join(NAMES) + "; with ours")
    arguments = parser.parse_args()
    names = tuple(arguments.programs.split(","))
    if "ours" not in names or set(names) - set(NAMES):
        parser.error(f"--programs: {arguments.programs}: choose ours and others out of {', '.join(NAMES)}")
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        rows.append(measure(names, length, arguments.layout, arguments.rounds))
        print(json.dumps(rows[-1]), flush=True)
    from importlib.metadata import version

    packages = ("torch", "deepspeed", "transformers", "accelerate")
    report = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, gloo",
              "versions": {name: version(name) for name in packages},
              "programs": names, "rounds": arguments.rounds, "rows": rows}  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "speed.md").write_text(markdown(report))
    picture(report, arguments.out / "speed.png")


def in_words(ratio: dict[str, Any]) -> str:
    """Median and middle half."""
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"


def markdown(report: dict[str, Any]) -> str:
    """A row a length and program."""
    turns = ", ".join(f"{row['turns']} of {row['steps_a_turn']} at {row['seq_len']:,}" for row in report["rows"])
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    ours = [name for name in report["programs"] if name in OURS]
    beside = " | ".join(f"{name} / this (middle half)" for name in ours)
    lines = [
        "# Step time beside its peers",
        "",
        f"{report['machine']}; {versions}. All programs at once, one running at a time: {report['rounds']} rounds of "
        f"turns, from the end of a step to the end of a step ({turns} tokens; one sequence a step), after {UNMEASURED} "
        "steps that are not measured. Medians over turns; ratios of neighbouring turns "
        "with their middle half. tiny_llama (4 layers, hidden 128, 8 query and 4 KV heads), AdamW, fp32. To first "
        "step: from the command, alone on the machine; warm: of a sweep's later jobs; compiled: train.compile=true, "
        "with nothing compiled before. Torch's attention alone: the recipe's calls of scaled_dot_product_attention and "
        "nothing else; ours runs that kernel's backward in blocks that stay in the cache (attention_cpu.md). "
        f"Losses: the first {COMPARED}.",
        "",
        f"| tokens | layout | program | step | {beside} | to first step | worst rank's VmHWM | loss differs by |",
        "| --- | --- | --- | --- |" + " --- |" * len(ours) + " --- | --- | --- |",
    ]
    for row in report["rows"]:
        for name in report["programs"]:
            cell = row[name]
            beside = " | ".join("1" if our == name else in_words(ratio) for our, ratio in cell["over_this"].items())
            rest = "- | - | -"
            if name != ALONE:
                begun = f"{cell['time_to_first_step_s']:.1f} s"
                if name == "ours":
                    begun += f", warm {row['warm_time_to_first_step_s']:.1f} s"
                rest = f"{begun} | {cell['peak_memory_bytes'] / 2**20:.0f} MiB | {cell['max_rel_loss_diff']:.1e}"
            lines.append(
                f"| {row['seq_len']:,} | {row['layout']} | {name} | {cell['step_time_s']:.3f} s | {beside} | {rest} |"
            )
    return "\n".join(lines) + (
        "\n\n![step times and times to the first step](speed.png)"
        "\n\nWhat the losses differ by grows with the steps: the peers' gradients are sp times too large "
        "(docs/findings.md, 1), of which AdamW hides all but what its epsilon lets through. Ours are the single "
        "process's (parity.md).\n\nArcticTraining: not run, it needs transformers < 5 and CUDA.\n"
    )


def picture(report: dict[str, Any], path: Path) -> None:
    """Step times over the recipe's with their middle half, and times from the command to the end of the first step."""
    rows, base = report["rows"], "recipe" if "recipe" in report["programs"] else "ours"
    steps, warm = [name for name in report["programs"] if name != ALONE], "ours, warm"
    with matplotlib.rc_context(RC):
        canvas = figure(9.5, 0.9 + 0.3 * len(rows) * (len(steps) + 1))
        panels = canvas.subplots(1, 2)

        def bars(axes: Any, names: list[str], value: Any, label: str) -> None:
            """A group of bars a length; `value` of a row and name: its size, its text and, perhaps, its spread."""
            for place, (row, name) in enumerate((row, name) for row in rows for name in names):
                at = place + place // len(names)  # a gap between lengths
                size, text, around = value(row, name)
                look = [*steps, warm].index(name)
                axes.barh(
                    at, size, height=0.85, color=COLOURS[look], hatch=HATCHES[look], edgecolor="white", label=name
                )
                if around:
                    axes.plot(around, (at, at), color="black", linewidth=1)
                axes.annotate(f" {text}", (max(size, *around) if around else size, at), va="center", fontsize=8)
            middles = [number * (len(names) + 1) + (len(names) - 1) / 2 for number in range(len(rows))]
            axes.set_yticks(middles, [f"{row['seq_len']:,} tokens" for row in rows])
            axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
            axes.set_xlabel(label)
            axes.grid(axis="y", visible=False)
            axes.invert_yaxis()

        def step(row: dict[str, Any], name: str) -> tuple[float, str, list[float]]:
            ratio = spread(row[name]["turns_s"], row[base]["turns_s"])
            return ratio["median"], f"{ratio['median']:.2f}, {of_seconds(row[name]['step_time_s'])}", ratio["quartiles"]

        def start(row: dict[str, Any], name: str) -> tuple[float, str, list[float]]:
            seconds = row["warm_time_to_first_step_s"] if name == warm else row[name]["time_to_first_step_s"]
            return seconds, of_seconds(seconds), []

        bars(panels[0], steps, step, f"time of a step over the {base}'s, and the time")
        bars(panels[1], [warm, *steps], start, "seconds from the command to the end of the first step")
        handles, labels = panels[1].get_legend_handles_labels()
        canvas.legend(
            handles[: len(steps) + 1], labels[: len(steps) + 1], loc="outside upper left", ncols=len(steps) + 1
        )
        canvas.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
