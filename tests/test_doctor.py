"""The doctor: what it says of this machine, of machines with something wrong, and of what dead runs have left."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.config import Config, nvml
from ulysses_exp.doctor import accelerators, machine, network, remains, storage, versions
from ulysses_exp.doctor.__main__ import asked_for, examine
from ulysses_exp.doctor.finding import Asked, Finding

KEY = "a1b2" * 10  # of the form of a W&B key


def doctor(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RANK", "WORLD_SIZE"))}
    return subprocess.run(
        [sys.executable, "-m", "ulysses_exp.doctor", *arguments],
        cwd=cwd, env={**surroundings, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return asked_for([], 2, tmp_path_factory.mktemp("outputs"))


def of(asked: Asked, subject: str) -> dict[str, Finding]:
    ((_, findings),) = examine(asked, [subject])
    return {finding.name: finding for finding in findings}


def test_a_good_machine_is_called_good_and_its_collectives_are_measured(tmp_path: Path) -> None:
    done = doctor("--json", cwd=tmp_path, WANDB_API_KEY=KEY, RANK="3")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found = {(f["subject"], f["name"]): f for f in report["findings"]}
    assert report["ranks"] == 2 and report["status"] != "wrong"
    for name in ("all_to_all_single", "all_reduce", "all_gather", "reduce_scatter", "broadcast"):
        measured = found["collectives", name]["figures"]
        assert measured["right"] is True
        assert [s["bytes"] for s in measured["sizes"]] == [64 * 2**10, 2**20, 16 * 2**20]
        assert all(1e5 < s["bytes_per_second"] < 1e12 for s in measured["sizes"])
    assert found["collectives", "barrier"]["figures"]["seconds"] > 0
    assert "gloo" in found["collectives", "ranks"]["said"]
    assert found["tracking", "offline"]["state"] == "ok"
    assert found["tracking", "login"]["said"] == "a key is there"
    assert found["network", "launcher"]["state"] == "warning" and "RANK=3" in found["network", "launcher"]["said"]
    assert found["versions", "deepspeed"]["state"] == "ok"
    assert KEY not in done.stdout + done.stderr, "a key is never shown"
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_mistake_on_the_command_line_is_a_line(tmp_path: Path) -> None:
    done = doctor("sp.sizee=4", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["sp.sizee: unknown key; did you mean sp.size?"]


def test_versions_are_those_that_the_project_declares(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    python, needed = versions.declared()
    assert python == ">=3.11" and {"torch", "deepspeed", "hydra-core", "wandb"} <= {r.name for r in needed}
    assert all(finding.state == "ok" for finding in of(asked, "versions").values())

    real = versions.version
    monkeypatch.setattr(
        versions, "version", lambda name: {"torch": "2.7.1", "deepspeed": "0.19.9"}.get(name, real(name))
    )
    found = of(asked, "versions")
    assert found["torch"].state == "wrong" and found["torch"].mend == "pip install 'torch>=2.8'"
    assert found["deepspeed"].state == "warning" and "0.19.8" in found["deepspeed"].said

    def missing(name: str) -> str:
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", lambda name: missing(name) if name == "datasets" else real(name))
    assert of(asked, "versions")["hub"].state == "ok", "optional"
    config = replace(asked.config, data=replace(asked.config.data, name="hub"))
    found = of(replace(asked, config=config), "versions")
    assert found["hub"].state == "wrong" and found["hub"].mend == "pip install 'ulysses-exp[hub]'"


@pytest.mark.parametrize(
    ("subject", "variables", "name", "state"),
    [
        ("machine", {"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS", "wrong"),
        ("machine", {"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS", "wrong"),
        ("machine", {"OMP_NUM_THREADS": "4096"}, "OMP_NUM_THREADS", "warning"),
        ("network", {"GLOO_SOCKET_IFNAME": "eth99"}, "GLOO_SOCKET_IFNAME", "wrong"),
        ("network", {"GLOO_SOCKET_IFNAME": "lo"}, "GLOO_SOCKET_IFNAME", "ok"),
        ("network", {"NCCL_SOCKET_IFNAME": "^docker"}, "NCCL_SOCKET_IFNAME", "ok"),
        ("network", {"NCCL_SOCKET_IFNAME": "=l"}, "NCCL_SOCKET_IFNAME", "wrong"),
        ("network", {"MASTER_ADDR": "node7"}, "launcher", "warning"),
    ],
)
def test_settings_of_the_environment(
    asked: Asked, subject: str, variables: dict[str, str], name: str, state: str
) -> None:
    finding = of(replace(asked, environment=variables), subject)[name]
    assert finding.state == state
    assert (finding.mend != "") == (state != "ok"), "what is wrong comes with what mends it"


def test_limits_are_told(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        assert of(asked, "machine")["open files"].state == "warning"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert of(asked, "machine")["compiler"].state == "ok", "only some jobs need one"
    compiled = replace(asked.config, train=replace(asked.config.train, compile=True))
    assert of(replace(asked, config=compiled), "machine")["compiler"].state == "wrong"


def test_the_share_of_a_control_group(asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.machine, "control_groups", lambda: [tmp_path])
    for name, text in (("cpu.max", "50000 100000\n"), ("memory.max", f"{300 * 2**20}\n"), ("memory.current", "0\n")):
        (tmp_path / name).write_text(text)
    found = of(asked, "machine")
    assert machine.machine.cores() == 0.5 and "turns" in found["cores"].said
    assert found["memory"].state == "warning" and "300 MiB that the control group allows" in found["memory"].said
    (tmp_path / "memory.max").write_text("max\n")
    assert of(asked, "machine")["memory"].state == "ok"


def test_folders_that_cannot_be_written(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(f.state == "ok" for f in of(asked, "storage").values())
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("TMPDIR", "/proc/no-such-folder")
    found = of(replace(asked, outputs=Path("/proc/self/outputs")), "storage")
    assert {name: f.state for name, f in found.items()} == {
        "outputs": "wrong", "/dev/shm": "ok", "temporary": "warning", "HOME": "warning",
    }  # fmt: skip


def test_a_check_that_breaks_is_a_finding(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(network, "_loopback", broken)
    monkeypatch.setattr(storage, "_home", broken)
    assert of(asked, "network")["network"].said == "could not be looked at: RuntimeError: first line"
    assert of(asked, "storage")["outputs"].state == "ok", "what came before it stays"


#: Two GPUs of 80 GB, one of them half full, under a driver that runs CUDA up to 12.4
LIBRARY = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
const char *nvmlErrorString(int code) { return "Driver/library version mismatch"; }
int nvmlInit_v2(void) { return FAILS; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strcpy(text, "550.54.15"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *number) { *number = 12040; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned number, void **handle) { *handle = (void *)(long)(number + 1); return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size) { strcpy(text, "NVIDIA H100 80GB HBM3"); return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, memory *about) {
    about->total = 80ull << 30, about->used = (long)handle == 2 ? 40ull << 30 : 0; return 0; }
"""


@pytest.fixture
def gpus(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as NVIDIA's library describes it; with a parameter, one where it answers with that."""
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("no C compiler")
    (tmp_path / "nvml.c").write_text(LIBRARY)
    fails = f"-DFAILS={getattr(request, 'param', 0)}"
    library = tmp_path / "nvml.so"
    subprocess.run([compiler, "-shared", "-fPIC", fails, "-o", library, tmp_path / "nvml.c"], check=True)
    real = ctypes.CDLL

    def load(name: str | None, *more: object, **others: object) -> ctypes.CDLL:
        return real(str(library) if name == "libnvidia-ml.so.1" else name, *more, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(nvml.ctypes, "CDLL", load)
    monkeypatch.setattr(accelerators, "accelerators", lambda: 2)
    monkeypatch.setattr(accelerators, "device_of", lambda config: "cuda")


def test_gpus_and_their_driver(asked: Asked, gpus: None) -> None:
    import torch.version

    found = of(replace(asked, environment={}), "accelerators")
    assert found["GPUs"].said == ", ".join(["NVIDIA H100 80GB HBM3, 80.0 GiB"] * 2)
    assert found["GPU memory"].state == "warning" and "GPU 1: 40.0 GiB of 80.0 GiB" in found["GPU memory"].said
    assert "driver 550.54.15 runs CUDA up to 12.4" in found["driver"].said
    fits = torch.version.cuda is not None and int(torch.version.cuda.split(".")[0]) <= 12
    assert found["driver"].state == ("ok" if fits else "wrong")
    assert of(replace(asked, ranks=4), "accelerators")["ranks"].mend == "--ranks 2, or device=cpu"
    visible = replace(asked, environment={"CUDA_VISIBLE_DEVICES": "0,5"})
    assert of(visible, "accelerators")["visible"].said.startswith("CUDA_VISIBLE_DEVICES=0,5 names [5]")


@pytest.mark.parametrize("gpus", [18], indirect=True)
def test_a_driver_that_does_not_answer(asked: Asked, gpus: None) -> None:
    finding = of(asked, "accelerators")["driver"]
    assert finding.state == "wrong" and "Driver/library version mismatch" in finding.said


# -- remains ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *arguments]) as started:
        try:
            yield started
        finally:
            started.kill()


def server_of(command: int) -> str:
    """What the command line of a server of ranks, and of its ranks, holds."""
    return f"from ulysses_exp.launch.server import serve; serve(3, {command}, 'ulysses_exp.rank.preload')"


def run_folder(folder: Path, status: str) -> Path:
    for name in (".hydra", "checkpoints/step2", "checkpoints/.step4.partial/portable"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoints/.step4.partial/portable/weights.safetensors").write_bytes(b"half")
    (folder / "results.json").write_text(json.dumps({"status": status}))
    (folder / "run.log").touch()
    return folder


def test_only_what_dead_runs_left_is_found_and_removed(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    dead, alive = run_folder(outputs / "sweeps/a/dead", "running"), run_folder(outputs / "alive", "running")
    stranger = tmp_path / "outputs/thesis/checkpoints/.step4.partial"  # in no folder of a run
    stranger.mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leaked = _semaphore_of_a_killed_process()
    with (
        (alive / "run.log").open("a"),
        process(server_of(ended.pid)) as orphan,
        process(server_of(os.getpid())) as working,
        process("ulysses_exp.launch.server") as another,
    ):
        _until_started(orphan, working, another)
        try:
            found = remains.find(outputs)
            assert [p.pid for p in found.processes] == [orphan.pid]
            assert found.partial == [dead / "checkpoints/.step4.partial"] and found.interrupted == [dead]
            assert leaked in found.shared_memory
            told = list(remains.findings(found))
            assert all(finding.state == "warning" and finding.mend for finding in told)
            assert {f.name for f in told} == {"processes", "checkpoints", "runs", "/dev/shm"}

            done = doctor("--clean", "--outputs", str(outputs), cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            assert f"removing process {orphan.pid}" in done.stdout and "2 of 2 removed" in done.stdout
            assert orphan.wait(10) == -signal.SIGKILL
            assert working.poll() is None and another.poll() is None
            assert not (dead / "checkpoints/.step4.partial").exists() and (dead / "checkpoints/step2").exists()
            assert (alive / "checkpoints/.step4.partial").exists() and stranger.exists()
            assert leaked.exists(), "nobody can tell whose it is"
        finally:
            leaked.unlink()


def test_a_machine_without_remains_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remains, "_shared_memory", lambda held: [])  # other programs' on this machine
    (finding,) = remains.check(Asked(Config(), 2, tmp_path))
    assert finding.state == "ok"


def test_a_semaphore_in_use_is_no_remains(tmp_path: Path) -> None:
    """Held by a mapping, under a name that sem_open drops at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sem_open.restype, libc.sem_unlink.restype = ctypes.c_void_p, ctypes.c_int
    name = f"doctor-test-{os.getpid()}"
    file = Path(f"/dev/shm/sem.{name}")
    semaphore = libc.sem_open(name.encode(), os.O_CREAT, 0o600, 1)
    try:
        assert file.exists() and file not in remains.find(tmp_path).shared_memory
        libc.sem_close(ctypes.c_void_p(semaphore))
        assert file in remains.find(tmp_path).shared_memory
    finally:
        libc.sem_unlink(name.encode())


def _semaphore_of_a_killed_process() -> Path:
    name = f"doctor-test-killed-{os.getpid()}"
    code = (
        "import ctypes, os, signal; libc = ctypes.CDLL(None)\n"
        f"libc.sem_open({name.encode()!r}, os.O_CREAT, 0o600, 1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code])
    return Path(f"/dev/shm/sem.{name}")


def _until_started(*processes: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 10
    while not all(b"time.sleep" in Path(f"/proc/{p.pid}/cmdline").read_bytes() for p in processes):
        assert time.monotonic() < end
        time.sleep(0.01)
