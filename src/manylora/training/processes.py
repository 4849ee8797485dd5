"""The processes of one run, where a launcher (torchrun, `accelerate launch`) has started several: DDP.

Each step's rows are divided evenly between them, gradients are averaged over all answer tokens of the step, and so
every process holds the same weights; what is written and printed is the first one's business.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from manylora.errors import ConfigError
from manylora.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many there are, and which of them this is."""

    count: int = 1
    rank: int = 0

    @classmethod
    def here(cls) -> Processes:
        """As the launcher's environment says; one where there is no launcher."""
        count = os.environ.get("WORLD_SIZE", "1")
        if "RANK" not in os.environ or count in ("", "0", "1"):
            return cls()
        return cls(count=int(count), rank=int(os.environ["RANK"]))

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def rows_per_pass(self, config: TrainConfig) -> int:
        """Rows of one forward pass of each process: `micro_batch_size`, at most its share of a step's rows.

        Raises:
            ConfigError: a step's rows cannot be divided evenly.
        """
        share, rest = divmod(config.rows_per_step, self.count)
        if rest or not share:
            raise ConfigError(
                f"batch_size {config.rows_per_step} cannot be divided between {self.count} processes; give a "
                "multiple of them."
            )
        rows = min(config.micro_batch_size or share, share)
        if share % rows:
            raise ConfigError(
                f"micro_batch_size {rows} does not divide the {share} rows of each of {self.count} processes "
                f"(batch_size {config.rows_per_step}); give a divisor of it."
            )
        return rows

    def empty_rows(self, rows: int, config: TrainConfig) -> int:
        """Rows without loss to add to a run of `rows`, so that all processes make the same number of passes.

        accelerate would fill up with rows from the beginning, which would count twice.
        """
        return 0 if self.count == 1 else -rows % (self.rows_per_pass(config) * self.count)


def wait_for_all() -> None:
    """Return when every process of the run has come here; at once where there is one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
