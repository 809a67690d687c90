"""Which rank this process is, where somebody else has started the ranks: as torchrun tells it, or else Slurm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ulysses_exp.config import ConfigError

_NAMES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Seat:
    """A rank's place, and the store where all of them meet."""

    rank: int
    world: int
    local_rank: int
    host: str
    port: int
    hosted: bool  # the launcher has the store; else rank 0 has it
    attempt: str  # of a job that its launcher starts again: what earlier attempts left in the store is not this one's


def seat(environment: Mapping[str, str] = os.environ) -> Seat:
    """The seat that the environment describes. Raises ConfigError where it describes none."""
    names = next((names for names in _NAMES if names[0] in environment), None)
    if names is None:
        raise ConfigError(
            "launch", "launch=attached finds no ranks", "start the command with torchrun or srun, or set launch=local"
        )
    number, size, near = (_whole(name, environment) for name in names)
    rank, world, _ = names
    if number is None or size is None or number >= size:
        raise ConfigError("launch", f"{rank}={number} without a fitting {world}", "start with torchrun or srun")
    if "MASTER_ADDR" not in environment or (port := _whole("MASTER_PORT", environment)) is None:
        raise ConfigError(
            "launch",
            "launch=attached needs MASTER_ADDR and MASTER_PORT, where rank 0 listens",
            "start with torchrun, or export both, e.g. MASTER_ADDR=$(hostname) MASTER_PORT=29500 before srun",
        )
    attempts = (environment.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return Seat(
        rank=number,
        world=size,
        local_rank=near or 0,
        host=environment["MASTER_ADDR"],
        port=port,
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=".".join(attempts),
    )


def _whole(name: str, environment: Mapping[str, str]) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ConfigError("launch", f"{name}={value!r} is no number", "start the command with torchrun or srun")
    return int(value)
