"""The processes of a run: this one alone, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, reduce_tensor

from tlalign.config import UsageError, started_processes


@dataclass(frozen=True)
class Processes:
    """What this process is among those of the run.

    Attributes:
        device: Device of this process.
        rank: Number of this process; 0 writes and prints.
        world_size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, device: torch.device) -> Processes:
        """Joins the processes that torchrun or Slurm's srun started, if it did; of accelerators each takes its own.

        Args:
            device: Device that a process alone would run on.

        Raises:
            UsageError: If they can't be joined as the environment says.
        """
        if started_processes() == 1:
            return cls(device)
        if dist.is_initialized():
            return cls(device, dist.get_rank(), dist.get_world_size())
        if (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"
        ):
            # PyTorch 2.14: those that start again meet in the store of those before, with what these left in it.
            warnings.warn(
                "restarted processes may wait for each other for ever, unless torchrun is started with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment",
                stacklevel=2,
            )
        try:
            joined = init_distributed_device_so(device.type)
        except ValueError as error:  # what the environment lacks
            raise UsageError(f"expected to be started by torchrun, for there are several processes: {error}") from error
        return cls(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a floating tensor over the processes; the same bits in all of them."""
        return reduce_tensor(values, self.world_size) if self.several else values

    def share(self, value: Any) -> Any:
        """The value that the first process gives, in all of them."""
        if not self.several:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Context that the first process goes through alone, to fetch what the others then find."""
        own = [self.device.index] if self.device.type == "cuda" and self.device.index is not None else None
        if self.several and not self.first:
            dist.barrier(device_ids=own)
        yield
        if self.several and self.first:
            dist.barrier(device_ids=own)

    def leave(self) -> None:
        """Parts from the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()
