"""Where what a rank prints goes: into the run folder, never onto the user's terminal."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs


class RankLogs(LogsSpecs):
    """`rank0.log` (stdout), `rank0.err` (stderr), ... in one folder."""

    def __init__(self, folder: Path, world: int):
        super().__init__(log_dir=str(folder))
        self.folder, self.world = folder, world

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of each rank, in torch's terms."""
        ranks = range(self.world)
        return LogsDest(
            stdouts={r: str(self.folder / f"rank{r}.log") for r in ranks},
            stderrs={r: str(self.folder / f"rank{r}.err") for r in ranks},
            tee_stdouts={},
            tee_stderrs={},
            error_files={r: str(self.folder / f"elastic-rank{r}.json") for r in ranks},
        )

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)
