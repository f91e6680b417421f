"""A module trained by several processes: replicated (DistributedDataParallel) or sharded (FSDP2)."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffmic_fast.distributed.fsdp import gradient_divisor, is_sharded, shard_parameters
from diffmic_fast.distributed.processes import Processes


class ParallelModule:
    """Calls a module such that the backward pass reduces its gradients over the processes.

    Attributes:
        module: the module itself, with the parameters that an optimizer updates.
        divisor: the gradients become the sum of those of the processes, divided by this.
    """

    def __init__(
        self,
        module: nn.Module,
        processes: Processes,
        *,
        shard: bool,
        entry: nn.Module | None = None,
    ) -> None:
        """Collective: replicate or shard a module, on its device, with the parameters of rank 0.

        Sharding replaces the parameters, so it comes before the optimizers. A single process does neither.

        Args:
            module: what is trained.
            processes: those that share it.
            shard: shard the parameters instead of replicating them.
            entry: a module that holds `module` and whose forward is called (default: `module`).
        """
        self.module, self._call = module, module if entry is None else entry
        self.divisor = float(processes.world_size)
        if processes.world_size > 1 and shard:
            self.divisor = gradient_divisor(next(module.parameters()).device)
            shard_parameters(module)
        elif processes.world_size > 1:
            self._call = _replicated(self._call)

    def __call__(self, *args: Any) -> Any:
        """Call the module."""
        return self._call(*args)

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """A block of a micro-batch's passes: gradients are accumulated, and reduced on the last micro-batch."""
        if isinstance(self._call, DistributedDataParallel) and not last:
            return self._call.no_sync()
        if is_sharded(self.module):
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def reshard(self) -> None:
        """Free the gathered weights of a sharded module, also after forward passes without a backward pass."""
        if is_sharded(self.module):
            self.module.reshard()  # type: ignore[operator]


def _replicated(module: nn.Module) -> DistributedDataParallel:
    # Buffers are left alone; the option was renamed.
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    device = next(module.parameters()).device
    options: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
    if device.type == "cuda":
        options["device_ids"] = [device]
    return DistributedDataParallel(module, **options)
