"""However the ranks are started, a job gives the same numbers: here, by torchrun on two nodes, by submitit."""

import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT, only_run

QUICK = ["zero.stage=3", "train.steps=3", "train.seq_len=64", "tracker.mode=disabled", "device=cpu"]


def results(folder):
    return json.loads((only_run(folder) / "results.json").read_text())


@pytest.fixture(scope="module")
def losses(command, tmp_path_factory):
    """Of a job whose ranks the command has started itself."""
    folder = tmp_path_factory.mktemp("local")
    done = command("sp.size=2", *QUICK, "stages=[train]", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return results(folder)["stages"]["train"]["loss"]


@pytest.mark.long  # a minute: two agents, each with its imports
def test_torchrun_on_two_nodes(losses, tmp_path):
    """launchers/torchrun_two_nodes.sh with both agents on this machine: sequences are shared across them."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    surroundings = {**os.environ, "HEAD": "127.0.0.1", "PORT": "29533", "GPUS": "1", "OMP_NUM_THREADS": "1",
                    "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    agents = [
        subprocess.Popen(
            [ROOT / "launchers/torchrun_two_nodes.sh", "sp.size=2", *QUICK],
            cwd=tmp_path, env=surroundings | {"NODE": str(node)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for node in (0, 1)
    ]  # fmt: skip
    said = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    found = results(tmp_path)
    assert found["status"] == "ok"
    assert found["stages"]["train"]["loss"] == pytest.approx(losses, rel=1e-7)
    assert list(found["stages"]) == ["train", "eval", "reload"], "the default: five tasks, one after another"
    assert [cell["status"] for cell in found["stages"]["reload"]["cells"]] == ["ok"] * 4


@pytest.mark.long
def test_plain_srun(losses, tmp_path):
    """Slurm's environment alone tells the ranks apart; rank 0 has the store."""
    ranks = [
        subprocess.Popen(
            [sys.executable, ROOT / "run.py", "launch=attached", "sp.size=2", "stages=[train]", *QUICK], cwd=tmp_path,
            env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534", "GLOO_SOCKET_IFNAME": "lo"},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert results(tmp_path)["stages"]["train"]["loss"] == pytest.approx(losses, rel=1e-7)


def test_attached_without_ranks_is_refused(command, tmp_path):
    done = command("launch=attached", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "torchrun" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_ranks_submitted_by_submitit(losses, command, tmp_path):
    done = command("sp.size=2", *QUICK, "stages=[train]", "launch=slurm", "launch.cluster=local", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path)["stages"]["train"]["loss"] == pytest.approx(losses, rel=1e-7)


@pytest.mark.long
def test_jobs_submitted_by_hydra(losses, command, tmp_path):
    """hydra/launcher=submitit_slurm, with submitit's local executor in the place of Slurm: a process a job."""
    done = command(
        "-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "sweep.name=submitted", *QUICK,
        "sp.size=2,3", "stages=[train]", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep: 1 skipped, 1 ok" in done.stdout, "what became of the jobs is known here, too"
    (trained,) = [p for p in tmp_path.glob("outputs/sweeps/submitted/*/results.json") if p.parent.name == "sp2"]
    assert json.loads(trained.read_text())["stages"]["train"]["loss"] == pytest.approx(losses, rel=1e-7)
