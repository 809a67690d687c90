"""The machines a plan can be for: one file each in conf/hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ulysses_exp.config.errors import ConfigError, nearest
from ulysses_exp.config.paths import CONF

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """Nodes of GPUs. Rates are of one GPU, in one direction."""

    name: str
    memory_gib: float  # as torch reports it
    reserved_gib: float  # of it, what the CUDA context and NCCL take outside torch's allocator
    peak_tflops: dict[str, float] | None  # by precision, dense
    efficiency: dict[str, float] | None  # share of the peak that `matmul` and `attention` kernels reach
    gpus_per_node: int
    gbytes_per_s: dict[str, float] | None  # `node`: GPU to GPU within a node; `network`; `host`: to host memory
    host_memory_gib: float | None  # of a node

    @property
    def is_gpu(self) -> bool:
        return self.peak_tflops is not None

    @property
    def budget(self) -> int:
        """Bytes that tensors may take."""
        return int((self.memory_gib - self.reserved_gib) * GIB)

    @property
    def host_memory(self) -> float:
        """Bytes of host memory of a node; infinite where it is not known."""
        return math.inf if self.host_memory_gib is None else self.host_memory_gib * GIB

    def host_budget(self, world: int) -> float:
        """Bytes of host memory for each of `world` ranks; infinite where it is not known."""
        return self.host_memory / min(world, self.gpus_per_node)


def load(name: str) -> Hardware:
    """Reads conf/hardware/`name`.yaml, or the file `name` where that ends in `.yaml`.

    Raises:
        ConfigError: there is no such file, or it does not describe a machine.
    """
    path = Path(name) if name.endswith(".yaml") else CONF / "hardware" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (CONF / "hardware").glob("*.yaml"))
        raise ConfigError("plan.hardware", f"{name!r} is not a choice", nearest(name, known))
    try:
        return Hardware(**OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OmegaConfBaseException) as error:
        problem = f"{path.name} does not describe a machine ({str(error).splitlines()[0]})"
        raise ConfigError("plan.hardware", problem, "copy conf/hardware/h100.yaml and change its figures") from error
