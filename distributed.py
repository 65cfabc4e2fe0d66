"""Several processes: who this one is, what survives a restart by torchrun, and models and tensors in parts.

When a rank dies, torchrun ends the others and starts all of them again (--max-restarts). They find the folder in which
the launch trained before and go on from its last checkpoint; without a restart left, `train.py --resume` does.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from machine import CPUThreads, help_inductor, pick_device
from model import GPT


class Ranks:
    """Who this process is among those torchrun started (alone: rank 0 of 1), and its device."""

    def __init__(self, device: str, threads: int | None) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world, self.is_main = int(os.environ.get("WORLD_SIZE", 1)), self.rank == 0
        local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.world > 1 and self.device.type == "mps":  # has no process group
            self.device = torch.device("cpu")
        if self.device.type == "cuda":
            if self.world > 1:
                self.device = pick_device(f"cuda:{local_rank}")
            torch.cuda.set_device(self.device)
        self.threads = CPUThreads(threads, local_world)
        if self.world > 1:
            store = next(dist.rendezvous("env://"))[0]
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun's store outlives the ranks: those of a restart must not find the addresses of those
                # before. (Several machines count their restarts apart, so torchrun itself has to see to it there.)
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                    world_size=self.world)

    def sum(self, *values: float) -> list[float]:
        """Sum over ranks, in float64. (gloo has no average.)"""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_values(self, value: object) -> list:
        """Every rank's value, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------- torchrun's restarts

def launch() -> str:
    """A name for this launch of torchrun, the same on every rank and after every restart; empty without torchrun."""
    if os.environ.get("GROUP_WORLD_SIZE") == "1" and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # RUN/attempt_N/RANK/error.json, where RUN is a new directory for each launch, even under an old --rdzv-id
        return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[2].name
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def restart_folder(out: Path | None) -> Path | None:
    """The folder in which this launch of torchrun trained before it started its ranks anew; None if there is none.

    Each folder's .lock names the last launch that trained there. The newest folder would be a guess: a rank that died
    before it made its own would go on with another run's.
    """
    if launch() in ("", "none"):  # no torchrun, or several machines without --rdzv-id
        return None
    locks = [out / ".lock"] if out is not None else Path("out").glob("*/.lock")
    return next((path.parent for path in locks if path.exists() and path.read_text() == launch()), None)


# ---------------------------------------------------------------- models in parts

def parallelize(model: GPT, ranks: Ranks, parallel: str = "ddp", dtype: torch.dtype = torch.float32,
                compile: bool = False) -> nn.Module:
    """The model, on its device, as this rank is to call it. With fsdp its parameters become this rank's parts of them.

    parallel: "ddp" (data parallel) or "fsdp" (Zhao et al., 2023: one block at a time is whole on the device).
    """
    if compile:
        help_inductor()
        for block in model.model.layers:  # all have the same code, which is compiled once
            block.forward = torch.compile(block.forward)
    if ranks.world == 1:
        return model.to(ranks.device)
    if parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh  # imports torch.compile, two seconds' work
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        # blocks are gathered in dtype; autocast alone would keep its copy of every block from forward to backward
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh)
    model.to(ranks.device)
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, forward_sync_buffers=False,
                                   gradient_as_bucket_view=True)


def sync_gradients(wrapped: nn.Module, on: bool) -> None:
    """Whether the next backward pass sums its gradients over the ranks."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # fsdp
        wrapped.set_requires_gradient_sync(on)
    elif isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = on


# ---------------------------------------------------------------- tensors in parts

def is_sharded(x: Tensor) -> bool:
    """Whether this is a DTensor. (The import of that class takes two seconds, and most runs have none.)"""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor; any other tensor as it is."""
    return x.full_tensor() if is_sharded(x) else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """x, which every rank holds whole, sharded as `like` is; as it is where `like` is not sharded."""
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def gather_to_main(state: dict, ranks: Ranks) -> dict:
    """A copy of nested tensors, whole, on rank 0's CPU; None in place of each on other ranks. All ranks must call."""
    def take(x: Tensor) -> Tensor | None:
        x = whole(x)
        return x.to("cpu", copy=True) if ranks.is_main else None

    return tree_map_only(Tensor, take, state)
