"""Several processes: who this one is, messages, what survives a restart by torchrun, models and tensors in parts.

When a rank dies, torchrun ends the others and starts all of them again (--max-restarts). They find the folder in which
the launch trained before and go on from its last checkpoint; without a restart left, `train.py --resume` does.
"""

import atexit
import contextlib
import mmap
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cli import UserError, end_at_once, note

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from machine import CPUThreads, help_inductor, pick_device
from model import GPT

X86_LINUX = "Linux", "x86_64"


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
            SharedMemory.share(self)

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

    def main_does(self, function: Callable[[], Any]) -> Any:
        """What the function returns on rank 0, which alone calls it. Its UserError is raised on every rank."""
        found = None
        try:
            found = function() if self.is_main else None
        except UserError as error:
            found = error
        found = self.all_values(found)[0]
        if isinstance(found, UserError):
            raise found
        return found

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()
            # DDP keeps gloo's threads. One that lets go of its last tensor while Python takes itself down aborts the
            # process (pytorch #179291). So Python does not get that far.
            atexit.register(end_at_once)


# ---------------------------------------------------------------- small messages

class SharedMemory:
    """Memory that all ranks map, if torchrun started them on one x86 machine with Linux, without GPUs.

    A message takes 0.01 to 0.4 ms instead of the 0.2 to 4 ms of gloo's sockets. Three parts of the memory take turns. A
    rank writes to a part again three turns later: by then all have begun the turn before that one, and with it given up
    what they read here.
    """

    VALUES = 2**20  # fp32, of each rank in each part
    shared: "SharedMemory | None" = None  # this process's, as torch.distributed has a group

    def __init__(self, path: str, rank: int, pids: Sequence[int]) -> None:
        self.rank, self.pids, self.turn, values = rank, pids, 0, 3 * len(pids) * self.VALUES
        with Path(path).open("r+b") as file:
            file.truncate(4 * values + 8 * len(pids))
            memory = mmap.mmap(file.fileno(), 0)
        self.parts = torch.frombuffer(memory, dtype=torch.float32, count=values).chunk(3)
        self.turns = memoryview(memory)[4 * values:].cast("q")  # the last that each rank has written

    @classmethod
    def share(cls, ranks: Ranks) -> None:
        """Called by all ranks. (Processors other than x86 may show what is written in another order.)"""
        cls.shared = None
        one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"  # torchrun's word
        if ranks.device.type != "cpu" or not one_machine or (platform.system(), platform.machine()) != X86_LINUX:
            return
        file = None
        with contextlib.suppress(AttributeError, OSError):  # missing in builds for old systems, forbidden in a sandbox
            file = os.memfd_create("owlet")
        pids, paths = zip(*ranks.all_values((os.getpid(), f"/proc/{os.getpid()}/fd/{file}")), strict=True)
        mine, error = None, ""
        try:
            mine = cls(paths[0], ranks.rank, pids)
        except OSError as found:
            error = str(found)
        if error := next(filter(None, ranks.all_values(error)), ""):
            note(f"the ranks share no memory ({error}); going on with gloo's sockets, more slowly")
        else:
            cls.shared = mine
        if file is not None:
            os.close(file)

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
                if time.monotonic() > patience:  # it saves or evaluates, or is no more
                    time.sleep(1e-3)
                    if not Path(f"/proc/{pid}/exe").exists():  # gone, or a zombie
                        raise dist.DistBackendError(f"rank {rank} has ended")
        return found


def gather(mine: Tensor) -> tuple[Tensor, dist.Work | None]:
    """mine (n, ...), fp32 -> all ranks' (ranks x n, ...).

    Valid once the work is done (None: at once), until the second call of gather() or average() after this one.
    """
    memory, world = SharedMemory.shared, dist.get_world_size()
    if memory and mine.numel() <= memory.VALUES:
        return memory.gather(mine), None
    found = mine.new_empty(world * len(mine), *mine.shape[1:])
    # all to all: gloo's all_gather has half the speed
    return found, dist.all_to_all_single(found, torch.cat([mine] * world), async_op=True)


def average(x: Tensor) -> torch.futures.Future[Tensor]:
    """The mean over the ranks, in place."""
    memory = SharedMemory.shared
    x /= dist.get_world_size()
    if not memory or x.numel() > memory.VALUES:
        return dist.all_reduce(x, async_op=True).get_future().then(lambda done: done.value()[0])
    first, *others = memory.gather(x[None])
    x.copy_(first)
    for other in others:
        x += other
    done = torch.futures.Future()
    done.set_result(x)
    return done


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
    wrapped = DistributedDataParallel(model, device_ids=device_ids, forward_sync_buffers=False,
                                      gradient_as_bucket_view=True)
    if SharedMemory.shared:
        wrapped.register_comm_hook(None, lambda _, bucket: average(bucket.buffer()))
    return wrapped


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
