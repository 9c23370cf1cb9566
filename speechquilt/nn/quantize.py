"""Vector quantiser with an EMA codebook: vectors in, codebook ids out (spec 1, 2.4).

Trap: the codebook learns inside `forward` in training mode, once per call and without a gradient. Calling a
training-mode model twice for one batch (gradient checkpointing around the quantiser, say) updates it twice.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-5  # Laplace smoothing of the counts
CHUNK = 8192  # vectors per distance matrix: bounds memory at 8192 x codebook floats
POOL_PER_CODE = 4  # warm-up vectors kept for k-means, per code
KMEANS_PASSES = 10


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig:
    """A codebook: how large it is, and how it learns from the vectors that it sees in training."""

    codebook_size: int
    """Number of codes, at least 2. The ids that come out are 0 to codebook_size - 1."""
    width: int
    """Numbers per vector and per code."""
    decay: float = 0.99
    """How much of its past a code keeps at each update, between 0 and 1: it moves by 1 - decay towards the mean of its
    new vectors. Nearer to 1: slower and steadier."""
    restart_interval: int = 100
    """Updates between two searches for codes that are hardly used. Such codes are replaced by vectors of the batch."""
    restart_threshold: float = 0.01
    """A code counts as hardly used below this share of the average code's use: 0.01 is a hundredth of it. 0 replaces
    none."""
    warmup_updates: int = 0
    """Updates at the start in which vectors pass unquantised, while data is collected for a first codebook made by
    k-means. 0: quantise at once, with random codes."""
    metric_width: int = 0
    """Dimensions in which distances are measured, after a linear map that comes with the codes (`open`). 0: those of the
    vectors themselves, as in the paper."""
    seed: int = 0
    """Seed of the random codes, of k-means, and of the choice of vectors that replace codes."""

    def __post_init__(self) -> None:
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size={self.codebook_size} must be at least 2")
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay={self.decay} must lie between 0 and 1, for example 0.99")
        if not 0 <= self.metric_width <= self.width:
            raise ValueError(f"metric_width={self.metric_width} must be 0..{self.width}, the width of the vectors")
        if self.restart_interval < 1:
            raise ValueError(f"restart_interval={self.restart_interval} must be at least 1 update")

    def build(self) -> "VectorQuantizer":
        return VectorQuantizer(self)


@dataclass(frozen=True)
class Quantized:
    """`values_BTD` carry the straight-through gradient; `ids_BT` is None while the warm-up bypasses the codebook;
    `commitment_BT` is the squared distance to the code before its update, mean over channels, 0 in the padding and when
    the codebook is bypassed."""

    values_BTD: torch.Tensor
    ids_BT: torch.Tensor | None
    commitment_BT: torch.Tensor


class VectorQuantizer(nn.Module):
    """Nearest code by squared L2 on raw vectors: no normalisation, no projection, one codebook (spec 1, 2.1).

    Everything that later updates depend on is a buffer, so a restored state_dict continues exactly; random draws are a
    function of (seed, update). With torch.distributed initialised, all ranks see the vectors of all, and stay equal.
    `restarted`: codes that the last `forward` replaced, the same number on every rank.
    """

    codebook_KD: torch.Tensor
    ema_count_K: torch.Tensor
    ema_sum_KD: torch.Tensor
    updates: torch.Tensor
    active: torch.Tensor
    pool_ND: torch.Tensor
    pool_count: torch.Tensor
    metric_DE: torch.Tensor

    def __init__(self, config: VectorQuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.restarted = 0
        size, width = config.codebook_size, config.width
        codebook_KD = torch.randn(size, width, generator=self._generator(-1))
        pooled = POOL_PER_CODE * size if config.warmup_updates else 0
        self.register_buffer("codebook_KD", codebook_KD)
        if config.metric_width:
            self.register_buffer("metric_DE", torch.eye(width)[:, : config.metric_width].clone())
        self.register_buffer("ema_count_K", torch.ones(size))
        self.register_buffer("ema_sum_KD", codebook_KD.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("active", torch.tensor(config.warmup_updates == 0))
        self.register_buffer("pool_ND", torch.zeros(pooled, width))  # a ring: the newest warm-up vectors
        self.register_buffer("pool_count", torch.zeros((), dtype=torch.long))

    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor) -> Quantized:
        """Quantise; in training mode also update the codebook from the valid vectors. Computes in fp32 throughout."""
        dtype = x_BTD.dtype
        self.restarted = 0
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BTD = x_BTD.float()
            if self.training and not self.active and self.config.warmup_updates:
                self._warm_up(x_BTD.detach()[valid_BT])
            if not self.active:
                return Quantized(x_BTD.to(dtype), None, torch.zeros_like(x_BTD[..., 0]))
            ids_BT = self._nearest(x_BTD.detach())
            codes_BTD = self.codebook_KD[ids_BT]
            commitment_BT = (x_BTD - codes_BTD).square().mean(-1) * valid_BT
            if self.training:
                self._update(x_BTD.detach()[valid_BT], ids_BT[valid_BT])
            return Quantized((x_BTD + (codes_BTD - x_BTD).detach()).to(dtype), ids_BT, commitment_BT)

    def encode(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Nearest codes `ids_BT`. Raises ValueError before the warm-up has ended: there is no codebook yet."""
        if not self.active:
            raise ValueError(
                f"the codebook does not exist yet after {int(self.updates)} updates: it is made at the end of "
                f"warmup_updates={self.config.warmup_updates} or of a first run without it; train longer"
            )
        return self._nearest(x_BTD)

    def decode(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Codes of the ids, `[..., D]`. Raises ValueError on ids outside the codebook."""
        if ids_BT.numel() and not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < self.config.codebook_size:
            raise ValueError(
                f"speech ids must lie in 0..{self.config.codebook_size - 1}; these are of another tokenizer"
            )
        return self.codebook_KD[ids_BT]

    @torch.no_grad()
    def close(self) -> None:
        """Bypass the codebook from now on, until `open` gives one."""
        self.active.fill_(False)

    @torch.no_grad()
    def open(self, codebook_KD: torch.Tensor, metric_DE: torch.Tensor | None = None) -> None:
        """Quantise from now on with these codes, and with distances after this map where the config has a `metric_width`. On a GPU's rounding ranks may differ, so rank 0's count.

        How heavy a new code is decides whether it follows an encoder that learns: one that counts for many batches lags
        behind until they are forgotten.
        """
        codebook_KD = codebook_KD.to(self.codebook_KD)
        if metric_DE is not None:
            self.metric_DE.copy_(metric_DE)
        if _world_size() > 1:
            dist.broadcast(codebook_KD, 0)
            if metric_DE is not None:
                dist.broadcast(self.metric_DE, 0)
        self.codebook_KD.copy_(codebook_KD)
        self.ema_sum_KD.zero_()
        self.ema_count_K.zero_()  # the first update gives every code an equal share of its vectors
        self.active.fill_(True)

    def _nearest(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if not self.config.metric_width:
            return nearest_codes(x_BTD, self.codebook_KD)
        with torch.autocast(x_BTD.device.type, enabled=False):
            return nearest_codes(x_BTD.float() @ self.metric_DE, self.codebook_KD @ self.metric_DE)

    @torch.no_grad()
    def _warm_up(self, vectors_ND: torch.Tensor) -> None:
        """Collect vectors; once the warm-up is over and the pool is full, make the codebook from them instead."""
        size = len(self.pool_ND)
        if self.updates >= self.config.warmup_updates and self.pool_count >= size:
            self.open(kmeans(self.pool_ND, self.config.codebook_size, self._generator(int(self.updates))))
            return
        vectors_ND = gather_ranks(vectors_ND)[-size:]
        slots_N = (self.pool_count + torch.arange(len(vectors_ND), device=vectors_ND.device)) % size
        self.pool_ND[slots_N] = vectors_ND
        self.pool_count += len(vectors_ND)
        self.updates += 1

    @torch.no_grad()
    def _update(self, vectors_ND: torch.Tensor, ids_N: torch.Tensor) -> None:
        """One EMA step (spec 1, 2.4), then the dead-code restart when it is due."""
        decay, size = self.config.decay, self.config.codebook_size
        count_K = torch.bincount(ids_N, minlength=size).float()
        sum_KD = torch.zeros_like(self.codebook_KD).index_add_(0, ids_N, vectors_ND)
        if _world_size() > 1:
            dist.all_reduce(count_K)
            dist.all_reduce(sum_KD)
        new = self.ema_count_K.sum() == 0  # as `open` leaves them
        share = count_K.sum() / size
        self.ema_count_K.copy_(torch.where(new, share, self.ema_count_K))
        self.ema_sum_KD.copy_(torch.where(new, share * self.codebook_KD, self.ema_sum_KD))
        self.ema_count_K.mul_(decay).add_(count_K, alpha=1 - decay)
        total = self.ema_count_K.sum()
        self.ema_count_K.add_(EPSILON).mul_(total / (total + size * EPSILON))
        self.ema_sum_KD.mul_(decay).add_(sum_KD, alpha=1 - decay)
        self.codebook_KD.copy_(self.ema_sum_KD / self.ema_count_K[:, None])
        self.updates += 1
        if int(self.updates) % self.config.restart_interval == 0:
            self._restart_dead_codes(gather_ranks(vectors_ND))

    def _restart_dead_codes(self, vectors_ND: torch.Tensor) -> None:
        mean = self.ema_count_K.mean()
        dead_K = self.ema_count_K < self.config.restart_threshold * mean
        num_dead, num_vectors = int(dead_K.sum()), len(vectors_ND)
        if num_dead == 0 or num_vectors == 0:
            return
        self.restarted = num_dead
        order_N = torch.randperm(num_vectors, generator=self._generator(int(self.updates)))
        # With more dead codes than vectors, vectors are used several times.
        chosen_N = order_N.repeat(-(-num_dead // num_vectors))[:num_dead].to(vectors_ND.device)
        self.codebook_KD[dead_K] = vectors_ND[chosen_N]
        self.ema_count_K[dead_K] = mean
        self.ema_sum_KD[dead_K] = vectors_ND[chosen_N] * mean

    def _generator(self, update: int) -> torch.Generator:
        state = np.random.SeedSequence([self.config.seed, update + 1]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))


def nearest_codes(x_BTD: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """Index of the code with the smallest squared distance to each vector: `[..., D]` -> int64 `[...]`.

    It computes in float32, inside a region of mixed precision too.
    """
    with torch.autocast(x_BTD.device.type, enabled=False):
        return _nearest_codes(x_BTD.float(), codebook_KD)


def _nearest_codes(x_BTD: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    # |x - c|^2 without |x|^2, which is the same for all codes, finds the two nearest. It loses digits when vectors are
    # long and codes close, so plain differences decide between the two: streaming must choose as the whole clip does.
    half_norm_K = codebook_KD.square().sum(-1) / 2
    ids = []
    for x_ND in x_BTD.reshape(-1, x_BTD.shape[-1]).split(CHUNK):
        two_N2 = (x_ND @ codebook_KD.T - half_norm_K).topk(2, -1).indices.sort(-1).values
        distance_N2 = (x_ND[:, None] - codebook_KD[two_N2]).square().sum(-1)
        ids.append(two_N2.gather(1, distance_N2.argmin(-1, keepdim=True))[:, 0])
    return torch.cat(ids).view(x_BTD.shape[:-1])


@torch.no_grad()
def kmeans(
    vectors_ND: torch.Tensor, num_codes: int, generator: torch.Generator, *, passes: int = KMEANS_PASSES
) -> torch.Tensor:
    """`passes` passes of Lloyd's algorithm from a random distinct sample -> centres `[K, D]`.

    An emptied cluster takes the vector farthest from its centre. Needs at least `num_codes` vectors.
    """
    order_N = torch.randperm(len(vectors_ND), generator=generator).to(vectors_ND.device)
    centres_KD = vectors_ND[order_N[:num_codes]].clone()
    half_norm_N = vectors_ND.square().sum(1) / 2
    for _ in range(passes):
        # argmax of x.c - |c|^2 / 2: the matrix product alone, where distances would cost three passes over memory more
        half_norm_K = centres_KD.square().sum(1) / 2
        parts = [(chunk @ centres_KD.T - half_norm_K).max(-1) for chunk in vectors_ND.split(CHUNK // 4)]
        ids_N = torch.cat([p.indices for p in parts])
        distance_N = half_norm_N - torch.cat([p.values for p in parts])
        count_K = torch.bincount(ids_N, minlength=num_codes).float()
        sum_KD = torch.zeros_like(centres_KD).index_add_(0, ids_N, vectors_ND)
        empty_K = count_K == 0
        centres_KD = sum_KD / count_K.clamp(min=1)[:, None]
        if num_empty := int(empty_K.sum()):
            centres_KD[empty_K] = vectors_ND[distance_N.topk(num_empty).indices]
    return centres_KD


def perplexity(count_K: torch.Tensor) -> torch.Tensor:
    """How many codes, used equally often, have the entropy of `count_K` (exp of that entropy); 0 without counts."""
    share_K = count_K.double() / count_K.sum().clamp(min=EPSILON)
    entropy = -torch.special.xlogy(share_K, share_K).sum()
    return (entropy.exp() * (count_K.sum() > 0)).float()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_ranks(x_ND: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in rank order; `x_ND` itself without torch.distributed."""
    if _world_size() == 1:
        return x_ND
    sizes = [torch.zeros(1, dtype=torch.long, device=x_ND.device) for _ in range(_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x_ND)], device=x_ND.device))
    longest = max(int(s) for s in sizes)
    padded = F.pad(x_ND, (0, 0, 0, longest - len(x_ND)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(n)] for p, n in zip(parts, sizes)])
