"""The training loop: one for the speech tokenizer, the text-to-token model and the language models.

It takes a model, an objective and a loader; what differs between the things that we train is in the objective. `train`
always goes on from the run folder's last checkpoint.
Trap: an objective returns sums. Loss, weight and scalars are added over micro-batches and ranks and divided once, so
accumulation and more processes give what one large batch gives.

Exact resume: a run that is killed at any moment and started again ends with the same bits on a CPU, given the same
machine, the same `num_threads` and a loader that keeps its promise. The state is model, moments, step, loader, torch's
generators and the sums. Python's and numpy's global generators are not part of it: nothing here uses them.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from speechquilt.config import to_dict
from speechquilt.files import make_folder
from speechquilt.protocols import Loader, Objective
from speechquilt.train import checkpoint, distributed, fsdp, metrics, optim, throughput
from speechquilt.train.guard import BadStep, BatchOutcome, StepGuard, StepOutcome
from speechquilt.train.loggers import LoggerName
from speechquilt.train.surroundings import (
    LateNumber,
    Progress,
    StopRequest,
    generator_states,
    reproducible,
    set_generator_states,
)

# Keys that a resumed run may change: none of them alters what is computed at a step. (`num_threads`, `device`,
# `compile`, `shard` and `recompute` alter the rounding.) `steps` is not among them: the learning rate depends on it.
FREE_KEYS = {
    "log_every",
    "loggers",
    "checkpoint_every",
    "checkpoint_async",
    "keep_checkpoints",
    "device",
    "num_threads",
    "compile",
    "recompute",
    "shard",
    "shard_size",
    "rank_timeout_s",
    "peak_flops",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: its length, learning rate, checkpoints, and how it uses the hardware."""

    steps: int
    """Optimizer steps of the whole run."""
    lr: float
    """Highest learning rate, reached at the end of the warm-up."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor of the learning rate of some parameters, by the beginning of their names, above 0; the longest beginning
    counts."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises evenly from 0 to `lr`. 0: it begins to fall at once."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step, as a share of `lr`: 0.1 ends at a tenth of it."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls from the warm-up to the last step: along half a "cosine", or "linear"."""
    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices alone (not on biases and norms). 0: none."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient, 0 to 1. Larger: it remembers longer."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient, 0 to 1. Larger: it remembers longer."""
    clip: float = 1.0
    """Largest norm of the mean gradient; a longer one is scaled down to it."""
    spike_factor: float | None = None
    """Report a step as a spike, with its batches, when its loss or gradient norm exceeds this many times the median of
    the last 64 steps; above 1, for example 4. None: nothing is reported."""
    skip_spikes: bool = False
    """Leave out the update of a step that is a spike; needs `spike_factor`. It waits for the device in every step, so
    it slows a GPU down."""
    accumulate: int = 1
    """Batches per step on every rank, one after the other. 2 gives the gradient of twice the batch in the same
    memory."""
    log_every: int = 10
    """Steps between two lines in metrics.jsonl."""
    loggers: tuple[LoggerName, ...] = ()
    """Where the lines of metrics.jsonl are shown as well; each needs its package."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step always writes one. A killed run goes on from the newest."""
    checkpoint_async: bool = False
    """Write checkpoints while training goes on. It needs memory on the CPU for a copy of the state."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk, at least 1."""
    seed: int = 0
    """Seed of the run: of torch's generators (plus the rank's number), and in the ready runs of the first weights and
    of the order of the data too."""
    device: str = "auto"
    """Where to train: "auto" (CUDA when there is one, else the CPU), "cpu", "cuda", or any device that torch names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of number in matrix products and the like: "bfloat16" is faster on GPUs and less exact. Weights and moments
    are always float32."""
    compile: bool = False
    """Compile the model block by block: faster steps on a GPU after a slow start."""
    recompute: Literal["none", "blocks", "selective"] = "none"
    """What is computed again in the backward pass, to save memory. "none": nothing. "selective": the cheap parts of
    each block. "blocks": all of each block; the least memory, the most compute."""
    shard: Literal["none", "full", "hybrid"] = "none"
    """How weights, gradients and moments lie on many ranks. "none": whole on each. "full": split over all. "hybrid":
    split over `shard_size` ranks, with a copy in every such group. Blocks then compute with weights in `dtype`."""
    shard_size: int = 8
    """Ranks in a group of `shard` "hybrid", usually the GPUs of one node. Must divide the number of ranks."""
    rank_timeout_s: float = 600.0
    """Seconds without an answer from a rank after which the run ends with an error."""
    peak_flops: float | None = None
    """FLOP/s that one device can reach; `mfu` in the metrics is the share of it that the run gets. None: looked up by
    the device's name, and no `mfu` where that is not known."""
    num_threads: int | None = None
    """CPU threads of torch. A resumed run gives the same bits only with the same number. None: torch's own choice."""

    def __post_init__(self) -> None:
        positive = ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints", "lr", "clip")
        for key in (*positive, "shard_size", "rank_timeout_s"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be positive")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must lie in 0..steps={self.steps}")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(f"spike_factor={self.spike_factor} must be above 1, or null to look for no spikes")
        if self.skip_spikes and self.spike_factor is None:
            raise ValueError("skip_spikes=true needs a spike_factor that says what a spike is; set one, for example 4")
        for prefix, scale in self.lr_scale.items():
            if scale <= 0:
                raise ValueError(
                    f"lr_scale[{prefix!r}]={scale} must be above 0; freeze parameters by requires_grad instead"
                )
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ValueError(f"peak_flops={self.peak_flops} must be positive, or null to look the device up")


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

    The model moves to the config's device. `watch` is shown the scalars of every metrics line; what it says of them is
    printed, and is the line's `warning`. Raises ValueError when `run_dir` cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        objective: Objective,
        loader: Loader,
        run_dir: Path,
        name: str = "train",
        watch: Callable[[dict[str, float | None]], str | None] | None = None,
    ) -> None:
        self.config, self.objective, self.loader, self.name = config, objective, loader, name
        self.watch = watch
        self.run_dir = Path(run_dir)
        make_folder(self.run_dir)
        self.device = distributed.start(config.device, config.rank_timeout_s)
        self.model = model
        self.sharded = config.shard != "none" and distributed.world_size() > 1  # one rank has nothing to split
        self._prepare(model)
        self.optimizer = optim.adamw(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            device=self.device,
            lr_scale=config.lr_scale,
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.writer = checkpoint.Writer(
            self.run_dir,
            keep=config.keep_checkpoints,
            background=config.checkpoint_async,
            device=self.device,
            timeout_s=config.rank_timeout_s,
        )
        self.step = 0
        self.sums = metrics.Sums()
        self.scalars: dict[str, float | None] = {}  # of the last metrics line
        self.grad_norm = torch.zeros(())
        self.guard = StepGuard(config.spike_factor)
        self.stop = StopRequest()
        self._stop_votes, self._late_votes = torch.zeros(()), LateNumber()
        self.clock = self._clock(seconds=0.0)

    def train(self, stop_after: int | None = None) -> TrainResult:
        """Go on from the last checkpoint to the last step, or to step `stop_after`; the model is left in eval mode.

        A sharded model stays sharded: `checkpoint.load_model(run_dir, ...)` fills a whole one. Raises ValueError when
        the run folder was made with another config or model, or when the loss is not finite; OSError when a checkpoint
        cannot be written; Stopped after SIGTERM or SIGINT; RuntimeError when another rank is gone. The last checkpoint
        is always kept.
        """
        config = self.config
        last = config.steps if stop_after is None else min(config.steps, stop_after)
        self.stop = StopRequest(patience_s=2.0 if distributed.world_size() > 1 else 0.0)
        with distributed.naming_lost_ranks(), reproducible(self.device, config.num_threads), self.stop, self.writer:
            self._resume()
            self._remind_watch()
            self.model.train()
            with (
                metrics.MetricsFile(
                    self.run_dir,
                    self.step,
                    writes=distributed.rank() == 0,
                    loggers=config.loggers,
                    title=self.name,
                ) as log,
                Progress(self.name, self.step, last, shown=distributed.rank() == 0 and self.step < last) as progress,
            ):
                while self.step < last:
                    self.train_step()
                    loss = self._log(log) if self.step == 1 or self._due(config.log_every) else None
                    stopping = self._agree_to_stop()
                    if stopping or self.step == last or self._due(config.checkpoint_every):
                        self._save(log)
                    progress.update(loss)
                    if stopping:
                        self.writer.wait()
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
        self.grad_norm = fsdp.clip_gradients(self.parameters, self.config.clip)
        self.guard.note(StepOutcome(self.step, sums["loss"], sums["weight"], self.grad_norm, batches))
        # On a CPU reading costs nothing; elsewhere it waits for the device, so it is left to logging and saving.
        spiked = self._check() if self.device.type == "cpu" or self.config.skip_spikes else False
        if not (spiked and self.config.skip_spikes):
            optim.set_lr(self.optimizer, self.lr)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.sums.add(sums)

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

    def _prepare(self, model: nn.Module) -> None:
        """The same weights on every rank's device, recomputed, compiled and sharded as the config wants it."""
        config = self.config
        fsdp.recompute_activations(model, config.recompute)
        if config.compile:
            fsdp.compile_parts(model)
        if self.sharded:
            dtype = getattr(torch, config.dtype)
            fsdp.shard(model, config.shard, size=config.shard_size, device=self.device, dtype=dtype)
        else:
            fsdp.place(model, self.device)

    def _accumulate(self) -> tuple[dict[str, torch.Tensor], list[BatchOutcome]]:
        """Backward through this rank's batches. Returns their summed loss, weight and scalars, and what to blame."""
        sums: dict[str, torch.Tensor] = {}
        batches = []
        for _ in range(self.config.accumulate):
            batch = self.loader.next_batch().to(self.device)
            with self._autocast():
                loss, weight, scalars = self.objective(self.model, batch)
            loss.backward()
            if reserved := metrics.RESERVED & scalars.keys():
                raise ValueError(
                    f"the objective names a scalar {sorted(reserved)[0]!r}, which is the trainer's own name"
                )
            for name, value in {"loss": loss, "weight": weight, **scalars}.items():
                value = value.detach().to(self.device, torch.float64)
                sums[name] = sums[name] + value if name in sums else value
            batches.append(BatchOutcome(loss.detach(), weight.detach(), getattr(batch, "meta", None)))
        return sums, batches

    def _sum_over_ranks(self, sums: dict[str, torch.Tensor]) -> None:
        """Gradients and sums, in place, and the wishes to stop. The objective must name the same scalars on every
        rank."""
        for p in self.parameters:
            if p.grad is None:  # not used in this step, here, but perhaps on another rank
                p.grad = torch.zeros_like(p)
        if self.step == 1 and any(names != list(sums) for names in distributed.gather_objects(list(sums))):
            raise ValueError(f"the objective names other scalars on another rank than {', '.join(sums)}")
        if not self.sharded:  # else the backward pass has added them
            distributed.sum_tensors([p.grad for p in self.parameters if p.grad is not None])
        self._stop_votes = torch.full((), float(self.stop.asked), dtype=torch.float64, device=self.device)
        distributed.sum_tensors([*sums.values(), self._stop_votes])

    def _autocast(self) -> Any:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _agree_to_stop(self) -> bool:
        """Whether to stop after this step: all ranks or none. On a GPU the answer is that of the step before."""
        if distributed.world_size() == 1:
            return self.stop.asked
        return self._late_votes.swap(self._stop_votes) > 0

    def _check(self) -> bool:
        """Whether the last step was a spike. Raises ValueError for a step that was no good, with what to do about
        it."""
        try:
            return self.guard.check()
        except BadStep as bad:
            kept = checkpoint.folders_of(self.run_dir)[-1:]
            raise ValueError(
                f"{bad}; look at that batch, or start another run with a lower lr (now {self.config.lr}) or more "
                "warmup_steps; " + (f"the checkpoint {kept[0]} is kept" if kept else "no checkpoint was written yet")
            ) from bad

    def _log(self, log: metrics.MetricsFile) -> float:
        """One line of metrics for the steps since the line before; returns their loss. Waits for the device."""
        self._check()
        means = self.sums.means()
        loss = means.pop("loss")
        assert loss is not None  # _check saw positive weights
        self.scalars = {"loss": loss, **means}
        self.sums.window = {}
        warning = self.watch(self.scalars) if self.watch else None
        if warning and distributed.rank() == 0:
            print(f"\n  {self.name}, step {self.step}: {warning}")
        totals = self.sums.read_totals()
        log.write(
            {
                "step": self.step,
                "loss": loss,
                "lr": self.lr,
                "grad_norm": float(self.grad_norm),
                **({} if self.config.spike_factor is None else {"spikes": self.guard.spikes}),
                **means,
                **totals,
                **({"warning": warning} if warning else {}),
                "seconds": self.clock.seconds,
                **self.clock.rates(self.step, totals),
            }
        )
        return loss

    def _save(self, log: metrics.MetricsFile) -> None:
        """Write a checkpoint of this step, all ranks together, after making sure that its weights are worth keeping."""
        self._check()
        log.sync()
        self.writer.save(
            self.step,
            tensors={
                "model": self.model.state_dict(),
                "optimizer": checkpoint.pack_optimizer(self.optimizer),
                "rng": generator_states(self.device, distributed.rank()),
            },
            state={
                "config": to_dict(self.config),
                "loader": _plain(self.loader.state_dict()),
                "sums": self.sums.state_dict(),
                "scalars": self.scalars,
                "guard": self.guard.state_dict(),
                "seconds": self.clock.seconds,
            },
        )

    def _resume(self) -> None:
        """Take everything from the run folder's last checkpoint; without one, seed torch and start at step 0."""
        folder = checkpoint.latest(self.run_dir, together=True)
        torch.manual_seed(self.config.seed + distributed.rank())
        self.optimizer.zero_grad()  # of a step that an exception cut short
        self.guard.forget()
        if folder is None:
            if self.step > 0:
                raise ValueError(f"step {self.step} failed before the first checkpoint; build model and Trainer anew")
            self.clock = self._clock(seconds=0.0)
            return
        state = checkpoint.load_state(folder)
        _require_same(to_dict(self.config), state["config"], folder)
        self.step = checkpoint.load_model(folder, self.model)
        checkpoint.load_optimizer(folder, self.optimizer)
        self.loader.load_state_dict(state["loader"])
        self.sums.load_state_dict(state["sums"], self.device)
        self.scalars = state["scalars"]
        self.guard.load_state_dict(state["guard"])
        self.clock = self._clock(seconds=state["seconds"])
        generators = checkpoint.load_generators(folder, list(generator_states(self.device, distributed.rank())))
        set_generator_states(generators, self.device, distributed.rank())

    def _remind_watch(self) -> None:
        """Show it the lines of the steps so far, so that it says what it would say in a run that was never killed."""
        if self.watch and self.step:
            for line in metrics.read_metrics(self.run_dir):
                if line["step"] <= self.step:
                    self.watch(line)

    def _clock(self, seconds: float) -> throughput.Clock:
        peak = self.config.peak_flops or throughput.peak_flops(self.device)
        return throughput.Clock(
            seconds=seconds,
            step=self.step,
            totals=self.sums.read_totals(),
            peak=None if peak is None else peak * distributed.world_size(),
        )


def _require_same(now: dict[str, Any], before: dict[str, Any], folder: Path) -> None:
    keys = (now.keys() | before.keys()) - FREE_KEYS
    differing = [f"{k}={now.get(k)!r} (was {before.get(k)!r})" for k in sorted(keys) if now.get(k) != before.get(k)]
    if differing:
        raise ValueError(
            f"{folder} was made with another config: {', '.join(differing)}; "
            "set these back to go on with that run, or choose another run_dir"
        )


def _plain(state: dict) -> dict:
    """A loader's state as a copy in JSON data; anything that JSON would bend (tuples, tensors, int keys) is an
    error."""
    try:
        copied = json.loads(json.dumps(state))
    except (TypeError, ValueError):
        copied = None
    if copied != state:
        raise ValueError(
            f"the loader's state_dict() must be plain JSON data to be resumed exactly, not {str(state)[:200]}"
        )
    return copied
