"""`speechquilt plan RECIPE`."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from speechquilt.commands.grammar import Positional
from speechquilt.config import nearest
from speechquilt.recipes import catalog
from speechquilt.stages.cost import GPUS, Machine


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of the papers' size costs, before anybody rents a machine: tokens, GPU-hours, storage, memory, time.

    `speechquilt train RECIPE` is the run that this prices. Each line says where its throughput comes from.
    """

    recipe: Positional[str]
    """A name that `speechquilt plan --help` lists, for example lst_1_4b."""
    gpus: int = 8
    """GPUs of the run."""
    gpu: str = "h100"
    """Kind of GPU: a100, h100, h200 or b200."""
    mfu: float = 0.5
    """Share of the bfloat16 peak that training reaches, above 0, at most 1."""
    json: bool = False
    """Print JSON for machines."""

    def run(self) -> None:
        data = self.priced()
        if self.json:
            print(json.dumps(data, indent=1))
            return
        print(f"{self.recipe} on {self.gpus} x {self.gpu}: {data['about']}\n")
        print(f"{'stage':<14}{'amount':>10} {'unit':<18}{'GPU-hours':>11}{'hours':>9}{'storage':>10}{'memory/GPU':>12}")
        for s in data["stages"]:
            memory = "" if s["memory_gib"] is None else f"{s['memory_gib']:.0f} GiB" + ("" if s["fits"] else " !")
            print(
                f"{s['name']:<14}{s['amount']:>10.3g} {s['unit']:<18}{s['gpu_hours']:>11,.0f}{s['hours']:>9,.1f}"
                f"{s['storage_gb']:>7,.0f} GB{memory:>12}"
            )
        print(f"{'all':<43}{data['gpu_hours']:>11,.0f}{data['hours']:>9,.1f}{data['storage_gb']:>7,.0f} GB\n")
        for s in data["stages"]:
            print(f"{s['name']}: {s['source']}")

    def priced(self) -> dict[str, Any]:
        """Plain JSON data: a line per stage and the totals. Raises ValueError on a name or number that makes no sense."""
        if self.gpu not in GPUS:
            raise ValueError(f"gpu {self.gpu!r} is unknown; {nearest(self.gpu, list(GPUS))}")
        if self.gpus < 1 or not 0 < self.mfu <= 1:
            raise ValueError(f"gpus={self.gpus} must be at least 1 and mfu={self.mfu} between 0 and 1")
        run = catalog.load(self.recipe)
        stages = run.stages(Machine(gpu=GPUS[self.gpu], gpus=self.gpus, mfu=self.mfu))
        fits = [s.memory_gib is None or s.memory_gib < GPUS[self.gpu].memory_gib for s in stages]
        gpu_hours = sum(s.gpu_hours for s in stages)
        return {
            "recipe": self.recipe,
            "about": run.about,
            "gpu": self.gpu,
            "gpus": self.gpus,
            "stages": [
                {**asdict(s), "gpu_hours": s.gpu_hours, "hours": s.gpu_hours / self.gpus, "fits": fit}
                for s, fit in zip(stages, fits)
            ],
            "gpu_hours": gpu_hours,
            "hours": gpu_hours / self.gpus,
            "storage_gb": sum(s.storage_gb for s in stages),
        }
