"""Several processes: ranks, messages, restarts by torchrun, and models and tensors in shards.

When a rank dies, torchrun ends the others and starts all of them again (--max-restarts). They find the folder in which
the launch trained before and go on from its last checkpoint; without a restart left, `train.py --resume` does.
"""

import atexit
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib.cli import UserError, end_at_once, note
from lib.machine import CPUThreads, pick_device
from model import GPT

# On other processors, ranks may see each other's writes in another order. Some builds of Python lack memfd_create.
CAN_SHARE = (platform.system(), platform.machine()) == ("Linux", "x86_64") and hasattr(os, "memfd_create")


class Ranks:
    """Who this process is among those torchrun started (alone: rank 0 of 1), and its device."""

    def __init__(self, device: str, threads: int | None) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main, self.device = self.rank == 0, pick_device(device)
        if self.world > 1 and self.device.type != "cpu":  # MPS has no process group
            self.device = pick_device("cpu" if self.device.type == "mps" else f"cuda:{os.environ['LOCAL_RANK']}")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.threads = CPUThreads(threads, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if self.world > 1:
            store = next(dist.rendezvous("env://"))[0]
            if os.environ.get("GROUP_WORLD_SIZE") == "1":  # several machines count their restarts apart
                # torchrun's store outlives the ranks: without a prefix, new ranks would find the addresses of dead ones
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                    world_size=self.world)
            # one of gloo's threads may abort Python's own shutdown (pytorch #179291)
            atexit.register(end_at_once)
            SharedMemory.share(self)

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over the ranks."""
        return [sum(of_all) for of_all in zip(*self.all_values(values), strict=True)]

    def all_values(self, value: object) -> list:
        """Every rank's value, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def main_does(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0 alone. Every rank returns what it returns, or raises its UserError or OSError."""
        try:
            found = function() if self.is_main else None
        except (UserError, OSError) as error:
            found = error
        if isinstance(found := self.all_values(found)[0], Exception):
            raise found
        return found

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------- small messages

class SharedMemory:
    """Memory that all ranks map, if torchrun started them on one x86 machine with Linux, without GPUs.

    A message takes 0.01 to 0.4 ms instead of the 0.2 to 4 ms of gloo's sockets. Three parts of the memory take turns:
    when a rank writes to a part again, all ranks have begun the turn before, and so have given up what they read there.
    """

    VALUES = 2**20  # fp32 values for each rank in each part
    shared: "SharedMemory | None" = None  # one per process, as the group of torch.distributed is

    def __init__(self, path: str, rank: int, pids: Sequence[int]) -> None:
        self.rank, self.pids, self.turn, values = rank, pids, 0, 3 * len(pids) * self.VALUES
        memory = torch.from_file(path, shared=True, size=values + 2 * len(pids), dtype=torch.float32)
        self.parts = memory[:values].chunk(3)
        self.turns = memory[values:].view(torch.int64).numpy()  # the last turn that each rank has written

    @classmethod
    def share(cls, ranks: Ranks) -> None:
        """Called by all ranks."""
        cls.shared, error = None, ""
        if not CAN_SHARE or ranks.device.type != "cpu" or os.environ.get("GROUP_WORLD_SIZE") != "1":  # one machine
            return
        try:
            path = ranks.main_does(lambda: f"/proc/{os.getpid()}/fd/{os.memfd_create('owlet')}")
            cls.shared = cls(path, ranks.rank, ranks.all_values(os.getpid()))
        except (OSError, RuntimeError) as found:  # a sandbox forbids it
            error = str(found)
        if any(errors := ranks.all_values(error)):
            cls.shared = None
            note(f"the ranks share no memory ({max(errors)}); going on with gloo's sockets, more slowly")

    def gather(self, mine: Tensor) -> Tensor:
        """As gather() below, of up to VALUES fp32 values. Raises DistBackendError if a rank has ended."""
        self.turn += 1
        found = self.parts[self.turn % 3][:len(self.pids) * mine.numel()].view(-1, *mine.shape[1:])
        found[self.rank * len(mine):][:len(mine)] = mine
        self.turns[self.rank] = self.turn
        patience = time.monotonic() + 1
        for rank, pid in enumerate(self.pids):
            while self.turns[rank] < self.turn:
                os.sched_yield()
                if time.monotonic() > patience:  # the rank saves or evaluates, or has died
                    time.sleep(1e-3)
                    if not Path(f"/proc/{pid}/exe").exists():  # gone, or a zombie
                        raise dist.DistBackendError(f"rank {rank} has ended")
        return found


def gather(mine: Tensor) -> tuple[Tensor, dist.Work | None]:
    """Every rank's tensor (n, ...), fp32, joined: (ranks * n, ...).

    Valid once the work is done (None: at once), until the second call of gather() or average() after this one.
    """
    memory = SharedMemory.shared
    if memory and mine.numel() <= memory.VALUES:
        return memory.gather(mine), None
    sent = torch.cat([mine] * dist.get_world_size())  # gloo's all_gather is half as fast as all_to_all
    found = torch.empty_like(sent)
    return found, dist.all_to_all_single(found, sent, async_op=True)


def average(x: Tensor) -> torch.futures.Future[Tensor]:
    """The mean over the ranks, in place."""
    memory, done = SharedMemory.shared, torch.futures.Future()
    x /= dist.get_world_size()
    if not memory or x.numel() > memory.VALUES:
        return dist.all_reduce(x, async_op=True).get_future().then(lambda done: done.value()[0])
    done.set_result(torch.sum(memory.gather(x[None]), 0, out=x))
    return done


# ---------------------------------------------------------------- torchrun's restarts

def launch() -> str:
    """A name for this launch of torchrun, the same on every rank and after every restart; empty without torchrun."""
    if os.environ.get("GROUP_WORLD_SIZE") == "1" and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # RUN/attempt_N/RANK/error.json, where RUN is a new directory for each launch, even under an old --rdzv-id
        return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[2].name
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def restart_folder(out: Path | None) -> Path | None:
    """The folder whose .lock names this launch of torchrun: its ranks trained there before they were started anew.

    The newest folder would be a guess: a rank that died before it made its own would go on with another run's.
    """
    if launch() in ("", "none"):  # no torchrun, or several machines without --rdzv-id
        return None
    locks = [out / ".lock"] if out is not None else Path("out").glob("*/.lock")
    return next((path.parent for path in locks if path.exists() and path.read_text() == launch()), None)


# ---------------------------------------------------------------- models and tensors in parts

def parallelize(model: GPT, ranks: Ranks, parallel: str = "ddp", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model on its device, wrapped for ddp or fsdp. With fsdp its parameters become this rank's shards.

    parallel: "ddp" (data parallel) or "fsdp" (Zhao et al., 2023: one block at a time is whole on the device).
    """
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
    wrapped = DistributedDataParallel(model.to(ranks.device), forward_sync_buffers=False, gradient_as_bucket_view=True)
    if SharedMemory.shared:
        wrapped.register_comm_hook(None, lambda _, bucket: average(bucket.buffer()))
    return wrapped


def sync_gradients(wrapped: nn.Module, on: bool) -> None:
    """Whether the next backward pass sums its gradients over the ranks."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # fsdp
        wrapped.set_requires_gradient_sync(on)
    elif isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = on


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
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor
        x = distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    return x


def gather_to_main(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors whole and on the CPU, for rank 0 alone; one that is so already is not copied. All ranks must call."""
    found = {}
    for name, x in tensors.items():
        x = whole(x)  # all ranks take part
        if ranks.is_main:
            found[name] = x.cpu()
    return found
