"""Cores, memory, and the limits on processes and files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ulysses_exp.config import device_of, machine
from ulysses_exp.doctor.finding import Asked, Finding, ok, warning, wrong
from ulysses_exp.report.units import of_bytes

_SERVER_BYTES, _RANK_BYTES = 500 * 2**20, 250 * 2**20  # what a job of a tiny model takes, beside what ranks share
_FILES, _PROCESSES = 256, 256  # a rank has some thirty files open, and a few threads


def check(asked: Asked) -> Iterator[Finding]:
    """What the machine, its container and its user's limits leave to a job."""
    yield _cores(asked)
    yield _threads(asked)
    yield _memory(asked.ranks)
    yield _limit("open files", resource.RLIMIT_NOFILE, _FILES, "ulimit -n 4096")
    yield _limit("processes", resource.RLIMIT_NPROC, _PROCESSES, "ulimit -u 4096")
    yield _compiler(asked)


def _cores(asked: Asked) -> Finding:
    number = machine.cores()
    said = f"{number:g} to use, of {os.cpu_count()}"
    if device_of(asked.config) == "cpu" and asked.config.launch.name == "local" and asked.ranks > number:
        return ok("cores", f"{said}: {asked.ranks} ranks take turns, which is slower but right", cores=number)
    return ok("cores", said, cores=number)


def _threads(asked: Asked) -> Finding:
    given, ranks = asked.environment.get("OMP_NUM_THREADS"), asked.ranks
    if given is None:
        return ok("OMP_NUM_THREADS", "not set: ranks get one thread each, on GPUs their share of the cores")
    if not given.isdigit() or int(given) < 1:
        return wrong("OMP_NUM_THREADS", f"{given!r} is no number of threads", "unset OMP_NUM_THREADS, or set it to 1")
    if int(given) > 1 and int(given) * ranks > machine.cores():
        return warning("OMP_NUM_THREADS", f"{given} threads in each of {ranks} ranks, {machine.cores():g} cores",
                       f"OMP_NUM_THREADS={max(1, int(machine.cores()) // ranks)}")  # fmt: skip
    return ok("OMP_NUM_THREADS", given)


def _memory(ranks: int) -> Finding:
    free = int(re.findall(r"^MemAvailable:\s+(\d+)", machine.contents(Path("/proc/meminfo")), re.MULTILINE)[0]) * 1024
    said = f"{of_bytes(free)} free"
    for folder in machine.control_groups():
        limit, used = (
            machine.contents(folder / "memory.max").strip(),
            machine.contents(folder / "memory.current").strip(),
        )
        if limit.isdigit() and used.isdigit() and int(limit) - int(used) < free:
            # what is only cached goes when it is needed
            cached = re.findall(r"^inactive_file (\d+)", machine.contents(folder / "memory.stat"), re.MULTILINE)
            free = min(free, int(limit) - int(used) + int(cached[0] if cached else 0))
            said = f"{of_bytes(free)} free of the {of_bytes(int(limit))} that the control group allows"
    needed = _SERVER_BYTES + ranks * _RANK_BYTES
    if free < needed:
        return warning("memory", f"{said}, {ranks} ranks of a tiny model take about {of_bytes(needed)}",
                       "end other programs, raise the container's limit, or use fewer ranks")  # fmt: skip
    return ok("memory", said, free_bytes=free)


def _limit(name: str, which: int, least: int, mend: str) -> Finding:
    soft, hard = resource.getrlimit(which)
    if soft != resource.RLIM_INFINITY and soft < least:
        up_to = "" if hard == resource.RLIM_INFINITY else f" (up to {hard} without root)"
        return warning(name, f"at most {soft}", f"{mend}{up_to}")
    return ok(name, "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")


def _compiler(asked: Asked) -> Finding:
    """A C++ compiler with OpenMP and Python's headers, tried on three lines."""
    name, wanted = "compiler", asked.config.train.compile
    mend = "apt install g++ python3-dev, or set CXX"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        said = f"no {os.environ.get('CXX', 'g++')}"
        return wrong(name, f"{said}, which train.compile needs", mend) if wanted else ok(
            name, f"{said}; only train.compile and offloaded optimizers need one: {mend}"
        )  # fmt: skip
    command = [compiler, "-fsyntax-only", "-fopenmp", "-x", "c++", f"-I{sysconfig.get_paths()['include']}", "-"]
    tried = subprocess.run(command, input="#include <Python.h>\n#include <omp.h>\n", capture_output=True, text=True)
    if tried.returncode:
        said = next((line for line in tried.stderr.splitlines() if "error" in line), "does not compile")
        return wrong(name, f"{compiler}: {said}", mend) if wanted else warning(
            name, f"{compiler}: {said} (only train.compile needs it)", mend
        )  # fmt: skip
    return ok(name, f"{compiler}, with OpenMP and Python's headers")
