"""AdamW, its parameter groups, and the learning rate as a pure function of the step.

A schedule has no state here. The rate of step n is computed from n, so a resumed run cannot disagree with it; but it
depends on `steps`, and that is why a run cannot be resumed with another number of steps.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "linear"]


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    device: torch.device,
    lr_scale: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only (Llama practice: two or more dimensions).

    `lr_scale`: beginning of a parameter's name -> factor of its learning rate; the longest that fits counts. The groups
    carry `param_names`, by which checkpoints name the moments. Raises ValueError on a model without trainable
    parameters, and on a beginning that no parameter has.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no trainable parameters; unfreeze some before training")
    scales = dict(lr_scale or {})
    for prefix in scales:
        if not any(name.startswith(prefix) for name, _ in named):
            raise ValueError(f"lr_scale names {prefix!r}, but no trainable parameter begins so; one is {named[0][0]!r}")
    groups = []
    for scale in sorted({1.0, *scales.values()}, reverse=True):
        ours = [(n, p) for n, p in named if _scale_of(n, scales) == scale]
        common = {"lr": lr * scale, "lr_scale": scale}
        groups += [
            {"params": [(n, p) for n, p in ours if p.ndim >= 2], "weight_decay": weight_decay, **common},
            {"params": [(n, p) for n, p in ours if p.ndim < 2], "weight_decay": 0.0, **common},
        ]
    groups = [group for group in groups if group["params"]]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=fused)


def _scale_of(name: str, scales: Mapping[str, float]) -> float:
    fitting = [prefix for prefix in scales if name.startswith(prefix)]
    return scales[max(fitting, key=len)] if fitting else 1.0


def parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the optimizer's own order, the order of its state."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def lr_at(
    step: int, *, steps: int, lr: float, min_lr_ratio: float = 0.1, warmup_steps: int = 0, schedule: Schedule = "cosine"
) -> float:
    """Learning rate of the optimizer step number `step`, counted from 1 to `steps`.

    Rises linearly to `lr` at step `warmup_steps`, then falls to `lr * min_lr_ratio`, reached at the last step.
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return lr * (min_lr_ratio + (1.0 - min_lr_ratio) * left)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def divide_gradients(parameters: list[nn.Parameter], weight: torch.Tensor) -> None:
    """Turn summed gradients into mean ones, without waiting for the device."""
    for dtype in {p.grad.dtype for p in parameters if p.grad is not None}:
        grads = [p.grad for p in parameters if p.grad is not None and p.grad.dtype == dtype]
        torch._foreach_div_(grads, weight.to(dtype))
