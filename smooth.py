"""Outliers: a few channels of a published model's activations are a hundred times as large as the others, and one int8
scale for all of a token rounds the others away. Here scales move from those channels into the weights that they meet,
before these are rounded (SmoothQuant, Xiao et al., 2022). The fp32 model computes the same; in int8 it loses less.

The format stays as it is: what makes a channel smaller is the weight of the norm before it, the rows of v_proj before
o_proj, the rows of up_proj before down_proj. (A tied head has none: its norm is the model's last, its matrix the
embedding. See FineLinear in int8.py.)
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from generate import generate
from int8 import quantize, quantize_rows, quantize_tokens
from model import GPT

ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.8)  # the share of a channel's size that moves; see docs/log.md, "Smoothing"
TEXTS, LENGTH = 16, 256  # the model writes so many texts of so many tokens to learn the sizes from
FINE = 0.01  # a head whose product is further off than this share takes activations in two parts
TRIED = 256  # tokens on which the shares are tried


@dataclass
class Site:
    """Matrices that take the same input, and the weight that scales its channels."""

    source: nn.Module | None
    matrices: list[nn.Linear]
    rows: Tensor  # (K,) int64: the row of the source that scales each channel of the input


def sites(model: GPT) -> list[Site]:
    config, found = model.config, []
    channels, hidden = torch.arange(config.n_embd), torch.arange(config.n_hidden)
    heads = torch.arange(config.n_kv_head * config.head_dim).view(config.n_kv_head, 1, config.head_dim)
    values = heads.expand(-1, config.n_head // config.n_kv_head, -1).flatten()  # several heads read the same value
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        found += [Site(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], channels),
                  Site(attention.v_proj, [attention.o_proj], values),
                  Site(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], channels),
                  Site(mlp.up_proj, [mlp.down_proj], hidden)]
    return [*found, Site(None if config.tie_embeddings else model.model.norm, [model.lm_head], channels)]


@torch.no_grad()
def smooth(model: GPT, tokens: Tensor | None = None) -> tuple[GPT, bool]:
    """A copy of an fp32 model, with the same logits, whose int8 loses less; and whether its head needs FineLinear.

    tokens (n, T) int64: text to learn the channels' sizes from; None: the model writes it.
    """
    tokens = written(model) if tokens is None else tokens
    model = copy.deepcopy(model).eval()
    inputs = observe(model, tokens)
    for site, (largest, some) in zip(sites(model), inputs, strict=True):
        weight = torch.cat([matrix.weight for matrix in site.matrices])
        best = torch.ones(int(site.rows.max()) + 1)
        least = error(some, weight)
        for alpha in ALPHAS if site.source is not None else ():
            factors = balance(largest, weight.abs().amax(dim=0), site.rows, alpha)
            by = factors[site.rows]
            if (found := error(some / by, weight * by)) < least:
                least, best = found, factors
        if site.source is not None:
            site.source.weight.div_(best if site.source.weight.dim() == 1 else best[:, None])
            for matrix in site.matrices:
                matrix.weight.mul_(best[site.rows])
    return model, least > FINE**2 * (some @ weight.T).square().sum().item()  # the last site is the head


def written(model: GPT) -> Tensor:
    """Texts that the model writes, in int8: (TEXTS, up to LENGTH) int64."""
    generator, length = torch.Generator().manual_seed(0), min(LENGTH, model.config.block_size)
    first = torch.randint(0, model.config.vocab_size, (TEXTS, 1), generator=generator)
    tokens = generate(quantize(model), first, length - 1, generator=generator)
    return torch.cat([first, *(token[:, None] for token in tqdm(
        tokens, "writing text to calibrate with", total=length - 1, delay=2, leave=False, disable=None))], dim=1)


def observe(model: GPT, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each site's input: the largest size of each channel (K,), and TRIED tokens of it (TRIED or less, K)."""
    seen, every = [], math.ceil(tokens.numel() / TRIED)
    for site in sites(model):
        parts: list[tuple[Tensor, Tensor]] = []

        def see(matrix: nn.Linear, args: tuple[Tensor], parts: list = parts) -> None:
            x = args[0].flatten(0, -2)
            parts.append((x.abs().amax(dim=0), x[::every].clone()))

        seen.append((parts, site.matrices[0].register_forward_pre_hook(see)))
    for text in tqdm(tokens, "calibrating", delay=2, leave=False, disable=None):
        model(text[None])
    for _, hook in seen:
        hook.remove()
    return [(torch.stack([largest for largest, _ in parts]).amax(dim=0), torch.cat([some for _, some in parts]))
            for parts, _ in seen]


def balance(inputs: Tensor, weights: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """Factors for the rows of the source: size of the input ^ alpha / size of the weights ^ (1 - alpha)."""
    size, count = [], int(rows.max()) + 1
    for each in (inputs, weights):
        largest = torch.zeros(count).scatter_reduce(0, rows, each, "amax")
        size.append(largest.clamp(min=1e-5 * largest.max().clamp(min=1e-30)))
    factors = size[0]**alpha / size[1]**(1 - alpha)
    return factors / factors.log().mean().exp()  # about 1


def error(x: Tensor, weight: Tensor) -> float:
    """The squared error of x (T, K) times weight (N, K), both in int8."""
    q, x_scale = quantize_tokens(x)
    w, scale = quantize_rows(weight)
    return ((q * x_scale) @ (w * scale[:, None]).T - x @ weight.T).square().sum().item()
