"""Which rank a process is, as its launcher's environment tells it."""

import pytest

from ulysses_exp.config import ConfigError
from ulysses_exp.launch.seat import seat

MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", **MASTER}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN, {**SRUN, **TORCHRUN, "SLURM_PROCID": "0"}])
def test_the_rank_is_read(environment):
    found = seat(environment)
    assert (found.rank, found.world, found.local_rank) == (3, 8, 1)
    assert (found.host, found.port, found.hosted) == ("node0", 29500, False)


def test_the_launcher_may_have_the_store_and_start_again():
    first = seat({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    again = seat({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"})
    assert first.hosted and first.attempt != again.attempt


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "finds no ranks"),
        (MASTER, "finds no ranks"),
        ({"RANK": "0", **MASTER}, "WORLD_SIZE"),
        ({"RANK": "8", "WORLD_SIZE": "8", **MASTER}, "RANK=8"),
        ({"RANK": "-1", "WORLD_SIZE": "8", **MASTER}, "is no number"),
        ({"RANK": "0", "WORLD_SIZE": "two", **MASTER}, "is no number"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "MASTER_ADDR"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "is no number"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused_in_a_line(environment, said):
    with pytest.raises(ConfigError, match=said) as caught:
        seat(environment)
    assert "\n" not in str(caught.value)
