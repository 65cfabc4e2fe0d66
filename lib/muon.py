"""The optimizers: Muon for the blocks' matrices, AdamW for embedding, head and norms.

Muon (Jordan et al., 2024) replaces the gradient with the nearest orthogonal matrix, so that all its singular values are
about 1. Matrices of one shape are worked on as one batch, which several ranks divide among them.
"""

import math
from collections.abc import Iterable
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lib.distributed import gather, is_sharded, local, shard_like, whole
from model import GPT

# An odd polynomial: five iterations take singular values of 0.01 to 1 to between 0.7 and 1.2 (ibid.).
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 5


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newton-Schulz iteration, in dtype: x (n, rows, columns) = U S V^T -> about U V^T, in x's shape and dtype."""
    y = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value exceeds 1
    y = (y.mT if x.size(-2) > x.size(-1) else y).to(dtype)
    for a, b, c in COEFFICIENTS:  # each singular value s becomes a s + b s^3 + c s^5
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if x.size(-2) > x.size(-1) else y).to(x.dtype)


class Optimizer:
    """Parameters and their state: state[i] holds the tensors of params[i], by name.

    (torch.optim's own class imports torch.compile, which takes two seconds of every start. Its functions do not.)
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = list(params)
        self.state = [self.new_state(p) for p in self.params]

    def part(self, name: str) -> list[Tensor]:
        """What is remembered under a name, for each parameter; of a sharded one, this rank's part."""
        return [local(state[name]) for state in self.state]


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2017), here without weight decay."""

    def __init__(self, params: Iterable[Tensor], betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(params)
        self.betas = betas

    @staticmethod
    def new_state(p: Tensor) -> dict[str, Tensor]:
        return {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        adamw([local(p) for p in self.params], [local(p.grad) for p in self.params], self.part("exp_avg"),
              self.part("exp_avg_sq"), [], self.part("step"), fused=True, amsgrad=False, beta1=self.betas[0],
              beta2=self.betas[1], lr=lr, weight_decay=0.0, eps=1e-8, maximize=False)


class Muon(Optimizer):
    """For matrices, the same on all ranks or sharded (DTensor). Raises ValueError for anything else.

    Nesterov momentum; decoupled weight decay; steps of tall matrices are larger by sqrt(rows / columns).
    dtype: the matrix products of the Newton-Schulz iteration are computed in it.
    """

    def __init__(self, params: Iterable[Tensor], momentum: float = 0.85, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(params)
        self.momentum, self.dtype = momentum, dtype
        if any(p.dim() != 2 for p in self.params):
            raise ValueError("Muon takes matrices")

    @staticmethod
    def new_state(p: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0) -> None:
        params, buffers = self.params, self.part("momentum_buffer")
        if not params:
            return
        grads = [local(p.grad) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
        torch._foreach_lerp_(grads, buffers, self.momentum)  # Nesterov's look ahead
        if weight_decay:
            torch._foreach_mul_([local(p) for p in params], 1 - lr * weight_decay)

        sent = ((same, *self.shared_steps(same)) for same in batches_of_a_shape(params))
        for (same, steps, work), _ in pairwise(chain(sent, [None])):  # one batch is computed while another is sent
            if work is not None:
                work.wait()
            rows, columns = same[0].shape
            torch._foreach_add_([local(p) for p in same],
                                [local(shard_like(step, p)) for step, p in zip(steps, same, strict=False)],
                                alpha=-lr * math.sqrt(max(1, rows / columns)))

    def shared_steps(self, params: list[Tensor]) -> tuple[Tensor, dist.Work | None]:
        """Steps (n or more, rows, columns) for n matrices of a shape, valid as what gather() returns."""
        x = torch.stack([whole(p.grad) for p in params])
        if not dist.is_initialized():
            return orthogonalize(x, self.dtype), None
        share = math.ceil(len(x) / dist.get_world_size())
        mine = x[dist.get_rank() * share:][:share]
        steps = x.new_zeros(share, *x.shape[1:])
        steps[:len(mine)] = orthogonalize(mine, self.dtype)
        return gather(steps)


def batches_of_a_shape(params: list[Tensor]) -> list[list[Tensor]]:
    """Matrices grouped by shape; sharded ones as many at a time as there are ranks, so that no rank holds all whole."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    most = dist.get_world_size() if is_sharded(params[0]) else len(params)
    return [same[i:i + most] for same in shapes.values() for i in range(0, len(same), most)]


def make_optimizers(model: GPT, muon_lr: float, dtype: torch.dtype) -> tuple[Muon, AdamW]:
    """Muon, with its products in dtype, for the blocks' matrices, AdamW for all else (docs/log.md, "Optimizer").

    muon_lr 0: AdamW for all. The parameters must be on their device.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2 and muon_lr > 0]
    in_muon = {id(p) for p in matrices}
    return Muon(matrices, dtype=dtype), AdamW(p for p in model.parameters() if id(p) not in in_muon)


def update(model: GPT, optimizers: tuple[Muon, AdamW], rates: tuple[float, float], weight_decay: float = 0.0,
           grad_clip: float = 1.0) -> None:
    """Clip the gradients, take a step of each optimizer at its rate, clear the gradients. grad_clip 0: no clipping.

    weight_decay: Muon's decoupled weight decay.
    """
    if grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    muon, adam = optimizers
    muon.step(rates[0], weight_decay)
    adam.step(rates[1])
    model.zero_grad()
