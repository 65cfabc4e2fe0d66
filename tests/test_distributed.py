"""Messages between ranks: through shared memory, through sockets, and what a rank sees when another is no more."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, exit_codes, fork, free_port

from lib import distributed
from lib.cli import UserError

pytestmark = pytest.mark.skipif(not distributed.CAN_SHARE, reason="no shared memory here")
SIZES = [(1, 3), (2, 5, 7), (4,), (3, 64, 2), (101,)]


def values(rank: int, turn: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * turn + rank))


def come_to_the_same_values(ranks: distributed.Ranks, slow: int) -> None:
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


def refuse() -> None:
    raise UserError(f"{os.getpid()}: not this text")


def hear_what_rank_0_does_alone(ranks: distributed.Ranks) -> None:
    main = ranks.all_values(os.getpid())[0]
    assert ranks.main_does(os.getpid) == main
    with pytest.raises(UserError, match=f"{main}: not this text"):
        ranks.main_does(refuse)


def miss_a_rank_that_ends(ranks: distributed.Ranks) -> None:
    distributed.gather(torch.ones(1, 4))
    if ranks.rank == 1:
        os._exit(3)
    with pytest.raises(dist.DistBackendError, match="rank 1 has ended"):
        distributed.gather(torch.ones(1, 4))
    os._exit(7)  # without a goodbye to the group


def go_on_where_one_maps_no_memory(ranks: distributed.Ranks) -> None:
    assert distributed.SharedMemory.shared is not None
    real = distributed.SharedMemory.__init__

    def fails(memory, path: str, *args) -> None:
        real(memory, "/dev/null/memory" if ranks.rank == 1 else path, *args)

    distributed.SharedMemory.__init__ = fails
    distributed.SharedMemory.share(ranks)
    assert distributed.SharedMemory.shared is None
    assert distributed.average(torch.full((3,), float(ranks.rank))).wait().tolist() == [0.5] * 3


def member(task: Callable, args: list) -> None:
    distributed.SharedMemory.VALUES = 400
    task(distributed.Ranks("cpu", 1), *args)


@pytest.mark.parametrize(("task", "args", "codes"), [
    (come_to_the_same_values, [0], [0, 0]), (come_to_the_same_values, [1], [0, 0]),
    (come_to_the_same_values, [1], [0, 0, 0]), (hear_what_rank_0_does_alone, [], [0, 0]),
    (miss_a_rank_that_ends, [], [7, 3]), (go_on_where_one_maps_no_memory, [], [0, 0])])
def test_ranks_on_one_machine(task, args, codes):
    assert exit_codes(fork(member, task, args, ranks=len(codes))) == codes


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
