"""The options of predictions for many files."""

from dataclasses import dataclass

from deploy.errors import UsageError
from deploy.options import option

SUFFIXES = (".jsonl", ".parquet")
"""Of files of rows."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How to predict many files.

    top: of a classifier, the likeliest classes. min_score: of a detector, boxes with less are left out. workers: threads that decode;
    None: one for each CPU core, at most 8.
    """

    top: int = 5
    min_score: float = 0.3
    raw: bool = option(False, "With --out FILE: write the outputs as they are, whatever the model is for.")
    batch_size: int = option(32, "With --out: images of a batch.", metavar="B")
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.top < 1 or self.batch_size < 1 or (self.workers is not None and self.workers < 1):
            raise UsageError("`top`, `batch_size` and `workers` must be 1 or more")
        if not 0 <= self.min_score <= 1:
            raise UsageError(f"`min_score` must be 0 to 1, not {self.min_score:g}")


@dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """Where on Ray to predict. address: as `ray.init` takes it; None for the cluster of this machine, or a new one that ends with us."""

    address: str | None = None
    actors: int = option(1, "With --ray: the actors, each with a session.", metavar="N")
    actor_cpus: float = option(1.0, "With --ray: CPUs of an actor, and its threads unless --threads.", metavar="N")
    actor_gpus: float = option(0.0, "With --ray: GPUs of an actor, or a fraction of one.", metavar="N")

    def __post_init__(self) -> None:
        if self.actors < 1 or not self.actor_cpus >= 0 or not self.actor_gpus >= 0:
            raise UsageError("`actors` must be 1 or more, `actor_cpus` and `actor_gpus` 0 or more")
