"""Muon (Jordan et al., 2024): steps of momentum, made orthogonal, for a network's hidden matrices.

Of a gradient's singular values a few are large and most are small; Muon takes the step whose are all
about 1. Matrices of a shape go through the iteration as one batch; of several ranks, each takes its
share of the batch and sends the others what came of it.
"""

import math
from collections.abc import Iterable
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# An odd quintic that, five times over, takes singular values of 0.01 to 1 to between 0.7 and 1.2 (ibid.).
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 5


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newton-Schulz, in dtype: x (n, rows, columns) = U S V^T -> about U V^T, as x was."""
    y = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # so that no singular value is over 1
    y = (y.mT if x.size(-2) > x.size(-1) else y).to(dtype)
    for a, b, c in COEFFICIENTS:  # each singular value s becomes a s + b s^3 + c s^5
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if x.size(-2) > x.size(-1) else y).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices: replicated over the ranks, or sharded (DTensor). Raises ValueError for anything else.

    Nesterov momentum; decoupled weight decay; steps of tall matrices are larger by sqrt(rows / columns).
    dtype: of the iteration's matrix products.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 dtype: torch.dtype = torch.float32) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes matrices")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads = [local(p.grad) for p in params]
            buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, buffers, group["momentum"])  # Nesterov's look ahead
            if group["weight_decay"]:
                torch._foreach_mul_([local(p) for p in params], 1 - group["lr"] * group["weight_decay"])

            sent = ((same, *self.shared_steps(same)) for same in batches_of_a_shape(params))
            for (same, steps, work), _ in pairwise(chain(sent, [None])):  # while some travel, the next are computed
                if work is not None:
                    work.wait()
                rows, columns = same[0].shape
                torch._foreach_add_([local(p) for p in same],
                                    [local_part(step, p) for step, p in zip(steps, same, strict=False)],
                                    alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def shared_steps(self, params: list[Tensor]) -> tuple[Tensor, dist.Work | None]:
        """Steps (n or more, rows, columns) for n matrices of a shape; not there before the work is done."""
        x = torch.stack([whole(p.grad) for p in params])
        if not dist.is_initialized():
            return orthogonalize(x, self.dtype), None
        world, share = dist.get_world_size(), math.ceil(len(x) / dist.get_world_size())
        mine = x[dist.get_rank() * share:][:share]
        sent, steps = x.new_zeros(world, share, *x.shape[1:]), x.new_empty(world * share, *x.shape[1:])
        sent[:, :len(mine)] = orthogonalize(mine, self.dtype)  # the same to each: gloo gathers at half this speed
        return steps, dist.all_to_all_single(steps, sent.flatten(0, 1), async_op=True)


def batches_of_a_shape(params: list[Tensor]) -> list[list[Tensor]]:
    """All matrices of a shape; of sharded ones, which no rank is to hold all of, one for each rank at a time."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    most = dist.get_world_size() if isinstance(params[0], DTensor) else len(params)
    return [same[i:i + most] for same in shapes.values() for i in range(0, len(same), most)]


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_part(x: Tensor, like: Tensor) -> Tensor:
    """The part of x, which every rank holds, that this rank has of the sharded `like`."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).to_local()
