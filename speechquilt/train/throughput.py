"""How fast a run goes: steps, tokens and units per second, and the share of the hardware's peak that it reaches (MFU).

All of it is over all ranks and over the seconds since it was last asked for, checkpoints and logging included. FLOPs
are those of the model (`total_flops` of the objective), not those that recomputing adds.
"""

import time

import torch

# Dense bfloat16 peaks in FLOP/s, from the makers' data sheets; the first name found in the device's counts.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None when it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


class Clock:
    """Seconds of training over all resumes, and rates since it was last asked for them.

    `peak`: FLOP/s of all devices together, None when unknown.
    """

    def __init__(self, *, seconds: float, step: int, totals: dict[str, float], peak: float | None) -> None:
        self._began = time.monotonic() - seconds
        self._asked_at, self._step, self._totals, self._peak = seconds, step, totals, peak

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def rates(self, step: int, totals: dict[str, float]) -> dict[str, float]:
        """`rate` (steps per second), and what the objective's totals allow: `tokens_per_s`, `units_per_s`, `mfu`."""
        now = self.seconds
        passed = max(now - self._asked_at, 1e-9)
        per_s = {name: (total - self._totals.get(name, 0.0)) / passed for name, total in totals.items()}
        rates = {"rate": (step - self._step) / passed}
        rates |= {f"{kind}_per_s": per_s[f"total_{kind}"] for kind in ("tokens", "units") if f"total_{kind}" in per_s}
        if self._peak is not None and "total_flops" in per_s:
            rates["mfu"] = per_s["total_flops"] / self._peak
        self._asked_at, self._step, self._totals = now, step, totals
        return rates
