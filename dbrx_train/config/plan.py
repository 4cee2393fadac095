"""The section of a run's YAML that ``dbrx-train plan`` reckons with; training does not look at it.

(Annotations are types here, which OmegaConf reads: no ``from __future__ import annotations``.)
"""

from dataclasses import dataclass

from dbrx_train.options import option
from dbrx_train.schedule import parse_span


@dataclass
class PlanConfig:
    gpus: int | None = option(
        "how many GPUs; default: those of `parallelism`'s mesh, where it says how many, or else one group of "
        "`shard`, or else one machine",
        None,
        ge=1,
    )
    gpu: str = option("their kind, such as `h100`, `h200`, `b200`, `a100-80gb` or `a100-40gb`", "h100")
    machine: int = option("GPUs of one machine, which NVLink joins", 8, ge=1)
    network: float | None = option(
        "Gbit/s of each GPU's network adapter; default: the kind's usual (400; A100 200)", None, gt=0
    )
    imbalance: float = option(
        "tokens of the fullest rank's experts, relative to the mean; real routing costs 4 to 20 % of a step",
        1.1,
        ge=1,
    )
    gpu_hour_price: float | None = option(
        "dollars for a GPU and an hour; default: 2.35 for an H100 (reserved, 2026-03; 2.95 on demand, "
        "2026-05), and unknown for others",
        None,
        gt=0,
    )
    watts: float | None = option(
        "of a GPU and its share of the machine under load; default: the kind's", None, gt=0
    )
    pue: float = option("energy that the data centre takes, relative to its machines'", 1.2, ge=1)
    failures: float = option(
        "of a GPU and day, that end the run: 4.7e-4 in Llama 3's training, 2.9e-4 to 8.1e-4 in Meta's "
        "research cluster, 1.8e-3 in OPT's",
        5e-4,
        gt=0,
    )
    restart: str = option("from a failure until the run trains again", "15m")
    storage: float = option("GB/s at which all ranks together write a checkpoint", 50.0, gt=0)

    def check(self) -> None:
        _ = self.restart_seconds

    @property
    def restart_seconds(self) -> int:
        return parse_span(self.restart, "plan.restart")
