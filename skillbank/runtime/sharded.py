"""A frozen base that is spread over several processes, while what trains on it is whole in each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

__all__ = ["backward", "shard"]


def shard(model: nn.Module, trained: Collection[nn.Parameter], device: torch.device) -> None:
    """Spread the weights of a model's blocks over all processes, and move the model to a device.

    A block is a member of an `nn.ModuleList`, as the layers of a transformer are. torch's `fully_shard` gathers a block's weights for the time of its
    pass, forward and back; what is in no block, and what is trained, stays whole. There is no way back: load the base anew to predict.

    Args:
        model: changed in place.
        trained: parameters that are not to be spread.
        device: of this process.

    Raises:
        ValueError: there are no blocks, or only one process.
        ImportError: a torch before 2.7.

    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList, so no blocks to spread: train with shard=False")
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world == 1:
        raise ValueError("there is one process, so there is nothing to spread a base over: start several with `accelerate launch`")
    mesh, whole = init_device_mesh(device.type, (world,)), set(trained)
    for block in (block for blocks in reversed(lists) for block in blocks):
        fully_shard(block.to(device), mesh=mesh, ignored_params=whole)
    spread = {id(tensor) for blocks in lists for block in blocks for tensor in block.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in spread:
            tensor.data = tensor.data.to(device)


def backward(accelerator: Accelerator, params: Iterable[nn.Parameter], loss: Tensor) -> None:
    """Gradient of a loss, and on the last batch of a step its mean over all processes."""
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        gradients = [p.grad for p in params if p.grad is not None]
        means: Tensor = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
