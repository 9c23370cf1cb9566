"""The training loop: one for the speech tokenizer, the text-to-token model and the language models.

Place in the pipeline: layer 3. A recipe hands over a model, an objective and a loader; what differs between the things
that we train is in the objective. `train` always goes on from the run folder's last checkpoint.
Trap: an objective returns sums. Loss, weight and scalars are added over micro-batches and ranks and divided once, so
accumulation and more processes give what one large batch gives.

Exact resume: a run that is killed at any moment and started again ends with the same bits on a CPU, given the same machine,
the same `num_threads` and a loader that keeps its promise. The state is model, moments, step, loader, torch's generators and the sums.
Python's and numpy's global generators are not part of it: nothing here uses them.
"""

import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from speechquilt import config as configs
from speechquilt.protocols import Loader, Objective
from speechquilt.train import checkpoint, distributed, metrics, optim
from speechquilt.train.surroundings import Progress, StopRequest, reproducible

# Keys that a resumed run may change: none of them alters what is computed at a step. (`num_threads`, `device` and `compile`
# alter the rounding.) `steps` is not among them, because the learning rate depends on it.
FREE_KEYS = {"log_every", "checkpoint_every", "keep_checkpoints", "device", "compile", "num_threads"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. `lr` rises over `warmup_steps` and falls to `lr * min_lr_ratio` at the last of `steps`.

    A step adds `accumulate` batches of the loader on every rank. `clip` bounds the norm of the mean gradient. `dtype` is
    that of autocast; weights and moments are always float32. `num_threads` None leaves torch's own choice.
    """

    steps: int
    lr: float
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    accumulate: int = 1
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for key in ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints", "lr", "clip"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be positive")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must lie in 0..steps={self.steps}")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a run stands: steps done, its last metrics line's scalars, sums over the run, seconds of training."""

    steps: int
    metrics_path: Path
    scalars: dict[str, float | None]
    totals: dict[str, float]
    seconds: float


class Stopped(Exception):
    """SIGTERM or SIGINT arrived; the step was finished and a checkpoint written. The same command goes on from it."""

    def __init__(self, step: int, run_dir: Path) -> None:
        super().__init__(step, run_dir)  # the arguments themselves, so that it can come back from a worker process
        self.step, self.run_dir = step, run_dir

    def __str__(self) -> str:
        return f"stopped after step {self.step}; {self.run_dir} holds it, run the same command again to go on"


class Trainer:
    """Trains `model` on what `loader` yields, in `run_dir`. `name` stands in front of the progress line.

    The model moves to the config's device. Raises ValueError when `run_dir` cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        objective: Objective,
        loader: Loader,
        run_dir: Path,
        name: str = "train",
    ) -> None:
        self.config, self.objective, self.loader, self.name = config, objective, loader, name
        self.run_dir = _writable(Path(run_dir))
        self.device = distributed.start(config.device)
        self.model = model.to(self.device)
        self.forward_model = torch.compile(model) if config.compile else model
        self.optimizer = optim.adamw(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            device=self.device,
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.step = 0
        self.sums = metrics.Sums()
        self.scalars: dict[str, float | None] = {}  # of the last metrics line
        self.grad_norm = torch.zeros(())
        self.clock = _Clock(seconds=0.0, step=0)
        self._unchecked: list[_Health] = []

    def train(self, stop_after: int | None = None) -> TrainResult:
        """Go on from the last checkpoint to the last step, or to step `stop_after`; the model is left in eval mode.

        Raises ValueError when the run folder was made with another config or model, or when the loss is not finite;
        OSError when a checkpoint cannot be written; Stopped after SIGTERM or SIGINT. The last checkpoint is always kept.
        """
        config = self.config
        last = config.steps if stop_after is None else min(config.steps, stop_after)
        with reproducible(self.device, config.num_threads), StopRequest() as stop:
            self._resume()
            self.model.train()
            with (
                metrics.MetricsFile(self.run_dir, self.step, writes=distributed.rank() == 0) as log,
                Progress(self.name, self.step, last, shown=distributed.rank() == 0 and self.step < last) as progress,
            ):
                while self.step < last:
                    self.train_step()
                    loss = self._log(log) if self.step == 1 or self._due(config.log_every) else None
                    stopping = self._agree(stop)
                    if stopping or self.step == last or self._due(config.checkpoint_every):
                        self._save(log)
                    progress.update(loss)
                    if stopping:
                        raise Stopped(self.step, self.run_dir)
        self.model.eval()
        return TrainResult(
            steps=self.step,
            metrics_path=self.run_dir / metrics.FILE,
            scalars=self.scalars,
            totals=self.sums.read_totals(),
            seconds=self.clock.seconds,
        )

    def train_step(self) -> None:
        """One optimizer step: summed gradients of `accumulate` batches on every rank, divided by their weight."""
        self.step += 1
        sums, batches = self._accumulate()
        self._sum_over_ranks(sums)
        optim.divide_gradients(self.parameters, sums["weight"])
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        optim.set_lr(self.optimizer, self.lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sums.add(sums)
        self._unchecked.append(_Health(self.step, sums["loss"], sums["weight"], self.grad_norm.double(), batches))
        if self.device.type == "cpu":  # elsewhere reading waits for the device, so it is left to logging and saving
            self._check()

    @property
    def lr(self) -> float:
        """Learning rate of the step in hand."""
        c = self.config
        return optim.lr_at(
            self.step,
            steps=c.steps,
            lr=c.lr,
            min_lr_ratio=c.min_lr_ratio,
            warmup_steps=c.warmup_steps,
            schedule=c.schedule,
        )

    def _accumulate(self) -> tuple[dict[str, torch.Tensor], "_Batches"]:
        """Backward through this rank's batches. Returns their summed loss, weight and scalars, and what to blame."""
        sums: dict[str, torch.Tensor] = {}
        batches: _Batches = []
        for _ in range(self.config.accumulate):
            batch = self.loader.next_batch().to(self.device)
            with self._autocast():
                loss, weight, scalars = self.objective(self.forward_model, batch)
            loss.backward()
            if reserved := metrics.RESERVED & scalars.keys():
                raise ValueError(
                    f"the objective names a scalar {sorted(reserved)[0]!r}, which is the trainer's own name"
                )
            for name, value in {"loss": loss, "weight": weight, **scalars}.items():
                value = value.detach().to(self.device, torch.float64)
                sums[name] = sums[name] + value if name in sums else value
            batches.append((loss.detach(), getattr(batch, "meta", None)))
        return sums, batches

    def _sum_over_ranks(self, sums: dict[str, torch.Tensor]) -> None:
        """Gradients and sums, in place. The objective must name the same scalars on every rank."""
        for p in self.parameters:
            if p.grad is None:  # not used in this step, here, but perhaps on another rank
                p.grad = torch.zeros_like(p)
        if self.step == 1 and any(names != list(sums) for names in distributed.gather_objects(list(sums))):
            raise ValueError(f"the objective names other scalars on another rank than {', '.join(sums)}")
        distributed.sum_tensors([p.grad for p in self.parameters if p.grad is not None])
        distributed.sum_tensors(list(sums.values()))

    def _autocast(self) -> Any:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _agree(self, stop: StopRequest) -> bool:
        """Whether to stop after this step: all ranks or none, so several ask each other, but only when they log."""
        if distributed.world_size() == 1:
            return stop.asked
        return self._due(self.config.log_every) and any(distributed.gather_objects(stop.asked))

    def _check(self) -> None:
        """Raise ValueError for the first step since the last check whose loss, weight or gradient is unusable."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        table = torch.stack([torch.stack([h.loss, h.weight, h.grad_norm]) for h in unchecked])
        fine = table.isfinite().all(1) & (table[:, 1] > 0)
        if fine.all():
            return
        folder = checkpoint.latest(self.run_dir)
        raise ValueError(
            f"{unchecked[int(fine.long().argmin())].describe()}; look at that batch, or start another run with a lower lr "
            f"(now {self.config.lr}) or more warmup_steps; "
            + (f"the checkpoint {folder} is kept" if folder else "no checkpoint was written yet")
        )

    def _log(self, log: metrics.MetricsFile) -> float:
        """One line of metrics for the steps since the line before; returns their loss. Waits for the device."""
        self._check()
        means = self.sums.means()
        loss = means.pop("loss")
        assert loss is not None  # _check saw positive weights
        self.scalars = {"loss": loss, **means}
        self.sums.window = {}
        log.write(
            {
                "step": self.step,
                "loss": loss,
                "lr": self.lr,
                "grad_norm": float(self.grad_norm),
                **means,
                **self.sums.read_totals(),
                "seconds": self.clock.seconds,
                "rate": self.clock.rate(self.step),
            }
        )
        return loss

    def _save(self, log: metrics.MetricsFile) -> None:
        """Write a checkpoint of this step, from rank 0, after making sure that its weights are worth keeping."""
        self._check()
        generators = distributed.gather_objects(_generator_state(self.device))
        if distributed.rank() != 0:
            return
        log.sync()
        checkpoint.save(
            self.run_dir,
            self.step,
            tensors={
                "model": self.model.state_dict(),
                "optimizer": checkpoint.pack_optimizer(self.optimizer),
                "rng": {f"{key}.{r}": state for r, states in enumerate(generators) for key, state in states.items()},
            },
            state={
                "config": configs.to_dict(self.config),
                "loader": _plain(self.loader.state_dict()),
                "sums": self.sums.state_dict(),
                "scalars": self.scalars,
                "seconds": self.clock.seconds,
            },
            keep=self.config.keep_checkpoints,
        )

    def _resume(self) -> None:
        """Take everything from the run folder's last checkpoint; without one, seed torch and start at step 0."""
        folder = distributed.broadcast_object(checkpoint.latest(self.run_dir) if distributed.rank() == 0 else None)
        torch.manual_seed(self.config.seed + distributed.rank())
        self.optimizer.zero_grad()  # of a step that an exception cut short
        if folder is None:
            if self.step > 0:
                raise ValueError(f"step {self.step} failed before the first checkpoint; build model and Trainer anew")
            distributed.broadcast_tensors([x.detach() for x in self.model.state_dict().values()])
            self.clock = _Clock(seconds=0.0, step=0)
            return
        state = checkpoint.load_state(folder)
        _require_same(configs.to_dict(self.config), state["config"], folder)
        self.step = checkpoint.load_model(folder, self.model)
        checkpoint.unpack_optimizer(self.optimizer, checkpoint.load_tensors(folder, "optimizer"))
        self.loader.load_state_dict(state["loader"])
        self.sums.load_state_dict(state["sums"], self.device)
        self.scalars = state["scalars"]
        self.clock = _Clock(seconds=state["seconds"], step=self.step)
        _set_generator_state(checkpoint.load_tensors(folder, "rng"), self.device)


_Batches = list[tuple[torch.Tensor, Any]]  # of one step on this rank: loss, meta


@dataclass
class _Health:
    """What tells whether a step went well, as tensors, until somebody may wait for the device."""

    step: int
    loss: torch.Tensor
    weight: torch.Tensor
    grad_norm: torch.Tensor
    batches: _Batches

    def describe(self) -> str:
        """What is wrong, and the meta of the batches that did it."""
        loss, weight, grad_norm = (float(x) for x in (self.loss, self.weight, self.grad_norm))
        guilty = [meta for loss, meta in self.batches if not loss.isfinite()] or [meta for _, meta in self.batches]
        problem = f"step {self.step}: loss {loss:g}, weight {weight:g}, gradient norm {grad_norm:g}"
        rule = "nothing to predict in any batch" if weight == 0 else "all must be finite, the weight positive"
        return f"{problem}; {rule}; meta of its batches on rank {distributed.rank()}: {str(guilty)[:500]}"


class _Clock:
    """Seconds of training over all resumes, and steps per second since it was last asked."""

    def __init__(self, seconds: float, step: int) -> None:
        self._began = time.monotonic() - seconds
        self._asked = (step, seconds)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def rate(self, step: int) -> float:
        (earlier_step, earlier), self._asked = self._asked, (step, self.seconds)
        return (step - earlier_step) / max(self._asked[1] - earlier, 1e-9)


def _generator_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's global generators: dropout draws from them."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_generator_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """This rank's; a rank that the checkpoint does not know keeps its fresh seed."""
    rank = distributed.rank()
    if f"cpu.{rank}" in states:
        torch.set_rng_state(states[f"cpu.{rank}"])
    if device.type == "cuda" and f"cuda.{rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{rank}"], device)


def _require_same(now: dict[str, Any], before: dict[str, Any], folder: Path) -> None:
    keys = (now.keys() | before.keys()) - FREE_KEYS
    differing = [f"{k}={now.get(k)!r} (was {before.get(k)!r})" for k in sorted(keys) if now.get(k) != before.get(k)]
    if differing:
        raise ValueError(
            f"{folder} was made with another config: {', '.join(differing)}; "
            "set these back to go on with that run, or choose another run_dir"
        )


def _plain(state: dict) -> dict:
    """A loader's state as JSON data; anything that JSON would bend (tuples, tensors, int keys) is an error."""
    try:
        same = json.loads(json.dumps(state)) == state
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"the loader's state_dict() must be plain JSON data to be resumed exactly, not {str(state)[:200]}"
        )
    return state


def _writable(run_dir: Path) -> Path:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir: cannot create {run_dir} ({error.strerror}); choose a writable folder") from error
    if not os.access(run_dir, os.W_OK):
        raise ValueError(f"run_dir: {run_dir} is not writable; choose another folder or change its permissions")
    return run_dir
