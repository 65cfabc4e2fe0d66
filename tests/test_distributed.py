"""Messages between ranks: through shared memory, through sockets, and what a rank sees when another is no more."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, forks, free_port

from lib.cli import UserError
from lib.distributed import CAN_SHARE

pytestmark = pytest.mark.skipif(not CAN_SHARE, reason="no shared memory here")
SIZES = [(1, 3), (2, 5, 7), (4,), (3, 64, 2), (101,)]


def start(world: int, task, *args: object) -> list:
    """Processes of `task(rank, ...)`, each a rank on one machine as torchrun would start it."""
    port = free_port()
    processes = [forks().Process(target=member, args=(task, rank, world, port, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def ended(processes: list) -> list[int]:
    """Their exit codes."""
    for process in processes:
        process.join(100)
        process.kill()
    return [process.exitcode for process in processes]


def member(task, rank: int, world: int, port: int, *args: object) -> None:
    from lib import distributed

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_WORLD_SIZE": "1",
                   "TORCHELASTIC_RESTART_COUNT": "0"}
    distributed.SharedMemory.VALUES = 400
    task(distributed.Ranks("cpu", 1), distributed, *args)


def values(rank: int, turn: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * turn + rank))


def exchanges(ranks, distributed, slow: int) -> None:
    shared = distributed.SharedMemory.shared
    assert shared is not None and len(shared.pids) == ranks.world
    held = []  # of the last two calls
    for turn in range(60):
        shape = (5, 101) if turn % 11 == 0 else SIZES[turn % len(SIZES)]
        found, work = distributed.gather(values(ranks.rank, turn, shape))
        assert (work is None) == (shape != (5, 101))  # which do not fit
        if work is not None:
            work.wait()
        held = [*held[-1:], (found, torch.cat([values(rank, turn, shape) for rank in range(ranks.world)]))]
        if ranks.rank == slow and turn % 7 == 0:
            time.sleep(0.01)  # the others write the next turn meanwhile
        assert all(torch.equal(a, b) for a, b in held)
        if turn % 3:
            continue
        held = []
        mine = values(ranks.rank, turn, (turn * 13 + 1,))
        before = mine.data_ptr()
        mean = distributed.average(mine).wait()
        assert mean.data_ptr() == before
        assert torch.allclose(mean, sum(values(rank, turn, mine.shape) for rank in range(ranks.world)) / ranks.world,
                              atol=1e-6)
    every = ranks.all_values(mean.tolist())
    assert all(one == every[0] for one in every)


@pytest.mark.parametrize(("world", "slow"), [(2, 0), (2, 1), (3, 1)])
def test_all_ranks_come_to_the_same_values(world, slow):
    assert ended(start(world, exchanges, slow)) == [0] * world


def refuse() -> None:
    raise UserError(f"{os.getpid()}: not this text")


def main_does(ranks, distributed) -> None:
    main = ranks.all_values(os.getpid())[0]
    assert ranks.main_does(os.getpid) == main
    with pytest.raises(UserError, match=f"{main}: not this text"):
        ranks.main_does(refuse)


def test_what_rank_0_does_alone_all_ranks_hear():
    assert ended(start(2, main_does)) == [0, 0]


def dies(ranks, distributed) -> None:
    distributed.gather(torch.ones(1, 4))
    if ranks.rank == 1:
        os._exit(3)
    with pytest.raises(dist.DistBackendError, match="rank 1 has ended"):
        distributed.gather(torch.ones(1, 4))
    os._exit(7)  # without a goodbye to the group


def test_a_rank_that_ends_is_missed():
    assert ended(start(2, dies)) == [7, 3]


def cannot_map(ranks, distributed) -> None:
    assert distributed.SharedMemory.shared is not None
    real = distributed.SharedMemory.__init__

    def fails(memory, path: str, *args) -> None:
        real(memory, "/dev/null/memory" if ranks.rank == 1 else path, *args)

    distributed.SharedMemory.__init__ = fails
    distributed.SharedMemory.share(ranks)
    assert distributed.SharedMemory.shared is None
    assert distributed.average(torch.full((3,), float(ranks.rank))).wait().tolist() == [0.5] * 3


def test_ranks_of_which_one_maps_no_memory_go_on_without():
    assert ended(start(2, cannot_map)) == [0, 0]


ENDS = """
import sys, time
import torch
import torch.distributed as dist
from lib.cli import UserError, run
from lib.distributed import Ranks

class Slow:
    def __del__(self):
        time.sleep(2)

slow = Slow()  # Python takes this long to take itself down

def main():
    global group
    ranks = Ranks("cpu", 1)
    group = dist.group.WORLD  # kept, as DDP does
    if ranks.rank == 0:
        time.sleep(1)
    dist.all_reduce(torch.ones(4), async_op=True)  # on rank 1, a thread lets go of its tensor meanwhile
    print("ends", ranks.rank)
    if sys.argv[1] == "error":
        raise UserError("not this text")
    ranks.close()
    sys.exit(5)

run(main)
"""


@pytest.mark.parametrize(("how", "code"), [("well", 5), ("error", 2)])
def test_a_rank_ends_with_its_exit_code_whatever_the_threads_of_its_group_do(how, code):
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                                "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", ENDS, how], stdout=subprocess.PIPE, text=True,
                                  env=environment | {"RANK": str(rank)}) for rank in range(2)]
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code]
    assert said == ["ends 0\n", "ends 1\n"]
