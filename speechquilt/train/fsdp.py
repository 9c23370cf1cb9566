"""A model made ready for training: activations recomputed, blocks compiled, weights sharded over the ranks.

The parts are the model's own `blocks()`; a model without them is one part. Gradients of a sharded model are *sums* over
the ranks, like everything in training.
Trap: the order. What is recomputed is compiled, and what is compiled is sharded; the other way round, the gathering of
weights would be inside the graph. The optimizer is built after that, because sharding replaces the parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from speechquilt.train import distributed

Shard = Literal["none", "full", "hybrid"]
Recompute = Literal["none", "blocks", "selective"]

# What "selective" keeps: the outputs of matrix products and of attention, which are few and cost much to compute. The
# rest (norms, rotations, activations) is cheap to compute and large.
KEPT_NAMES = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
KEPT = {getattr(torch.ops.aten, name).default for name in KEPT_NAMES} | {torch.ops.higher_order.flex_attention}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts that are recomputed, compiled and sharded one by one; empty when the model names none."""
    blocks: Any = getattr(model, "blocks", list)
    return blocks()


def recompute_activations(model: nn.Module, how: Recompute) -> None:
    """Keep less for the backward pass: of each block its input ("blocks"), or that and what costs much ("selective").

    Same gradients, less memory, one more forward pass of what is not kept. Parameter names stay. A buffer that a block
    changes in `forward` is changed twice.
    """
    if how == "none":
        return
    for part in blocks_of(model) or [model]:
        part.forward = partial(_recomputed, part.forward, how == "selective")


def compile_parts(model: nn.Module) -> None:
    """Compile block by block, in place: blocks of one shape share one compilation, and gathering stays between them."""
    for part in blocks_of(model) or [model]:
        part.compile()


def place(model: nn.Module, device: torch.device) -> None:
    """To the device, with rank 0's weights and buffers on every rank; what is sharded already stays as it is."""
    model.to(device)
    distributed.broadcast_tensors([x.detach() for x in model.state_dict().values() if not isinstance(x, DTensor)])


def shard(model: nn.Module, how: Shard, *, size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Split parameters, and with them gradients and moments, over the ranks (FSDP2), in place.

    "full": over all ranks; "hybrid": over `size` ranks, in world_size / size replicas. Block by block, so that the
    whole model is never on the device. `dtype` is what blocks compute in and weights are gathered in; gradients are
    added in float32. Raises ValueError when `size` does not divide the number of ranks.
    """
    # Inputs are left alone: RoPE's tables stay float32, and autocast does the rest.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = _mesh(how, size, device)
    for part in (*blocks_of(model), model):
        place(part, device)
        fully_shard(part, mesh=mesh, mp_policy=policy)
        assert isinstance(part, FSDPModule)
        # Sums, not means: the trainer divides once by the weight of the whole batch. Gloo knows plain sums only.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients so that their common norm is at most `limit`; returns the norm before, whole on every
    rank."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _mesh(how: Shard, size: int, device: torch.device) -> DeviceMesh:
    ranks = distributed.world_size()
    if how == "full":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    if ranks % size:
        raise ValueError(
            f"shard_size={size} must divide the number of ranks, {ranks}; usually it is the GPUs of one node"
        )
    return init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("replicate", "shard"))


def _recomputed(forward: Callable, selective: bool, *args: Any, **kwargs: Any) -> Any:
    """`checkpoint` in a function of ours: the compiler skips torch's own functions, with everything inside them."""
    if selective:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep)


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
