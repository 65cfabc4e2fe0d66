"""Outliers: a few channels of a published model's activations are a hundred times as large as the others, and one int8
scale for all of a token rounds the others away. Three remedies, all exact in fp32 and each used where it helps:

Smoothing (Xiao et al., 2022): scales move from large channels into the weights that they meet, before these are
rounded. What makes a channel smaller is the weight of the norm before it, or the rows of v_proj and up_proj.
Slices: the hidden channels are put in the order of their size, and each quarter gets scales of its own (SlicedLinear).
A fine head: its activations take two rounds of int8 (FineLinear). A tied head cannot be smoothed.
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

# docs/log.md, "Smoothing"
ALPHAS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8)  # shares of a channel's size that are tried
COARSE = 0.02  # products that are further off than this share, smoothed, take the remedies behind
SLICES = 4
TEXTS, LENGTH = 16, 256  # the model writes so many texts of so many tokens to learn the sizes from
TRIED = 256  # tokens on which the shares are tried


@dataclass
class Site:
    """Matrices that take the same input, and what scales its channels."""

    matrices: list[nn.Linear]
    source: nn.Module | None
    rows: Tensor  # (K,) int64: the row of the source that scales each channel of the input
    gate: nn.Linear | None = None  # where the channels may be put in another order: what makes them beside the source

    @property
    def weight(self) -> Tensor:
        return torch.cat([matrix.weight for matrix in self.matrices])


def sites(model: GPT) -> list[Site]:
    """In the order of use; the head is the last."""
    config, found = model.config, []
    channels, hidden = torch.arange(config.n_embd), torch.arange(config.n_hidden)
    heads = torch.arange(config.n_kv_head * config.head_dim).view(config.n_kv_head, 1, config.head_dim)
    values = heads.expand(-1, config.n_head // config.n_kv_head, -1).flatten()  # several heads read the same value
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        found += [Site([attention.q_proj, attention.k_proj, attention.v_proj], block.input_layernorm, channels),
                  Site([attention.o_proj], attention.v_proj, values),
                  Site([mlp.gate_proj, mlp.up_proj], block.post_attention_layernorm, channels),
                  Site([mlp.down_proj], mlp.up_proj, hidden, mlp.gate_proj)]
    return [*found, Site([model.lm_head], None if config.tie_embeddings else model.model.norm, channels)]


@torch.no_grad()
def smooth(model: GPT, tokens: Tensor | None = None) -> tuple[GPT, dict]:
    """A copy of an fp32 model, with the same logits, whose int8 loses less; and what save_quantized is to do with it.

    tokens (n, T) int64: text to learn the channels' sizes from; None: the model writes it.
    """
    inputs = observe(model, written(model) if tokens is None else tokens)
    model = copy.deepcopy(model).eval()
    found = sites(model)
    plans = [search(site, *of) for site, of in zip(found, inputs, strict=True)]
    downs = [plan for site, plan in zip(found, plans, strict=True) if site.gate is not None]
    slices = SLICES if model.config.n_hidden % SLICES == 0 and sum(off for off, _ in downs) > COARSE * len(downs) else 1
    for site, of, (_, factors) in zip(found, inputs, plans, strict=True):
        if site.gate is not None and slices > 1:
            _, factors = search(site, *of, slices)
            apply(site, factors, by_size(of[1] / factors))
        elif site.source is not None:
            apply(site, factors)
    return model, {"slices": slices, "fine_head": plans[-1][0] > COARSE}


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


def search(site: Site, largest: Tensor, some: Tensor, slices: int = 1) -> tuple[float, Tensor]:
    """The least relative error of the site's int8 product that an alpha gives; its factors for the source's rows."""
    weight, exact, found = site.weight, some @ site.weight.T, []
    for alpha in ALPHAS if site.source is not None else (0.0,):
        factors = balance(largest, weight.abs().amax(dim=0), site.rows, alpha)
        x, w = some / factors[site.rows], weight * factors[site.rows]
        if slices > 1:
            x, w = (part[:, by_size(x)].unflatten(1, (slices, -1)) for part in (x, w))
        q, x_scale = quantize_tokens(x)
        w_q, scale = quantize_rows(w.reshape(-1, w.size(-1)))
        y = (q * x_scale).view_as(some) @ (w_q * scale[:, None]).view_as(weight).T
        found.append(((y - exact).norm().item() / max(exact.norm().item(), 1e-30), factors))
    return min(found, key=lambda each: each[0])


def balance(inputs: Tensor, weights: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """Factors for the rows of the source: size of the input ^ alpha / size of the weights ^ (1 - alpha); alpha 0: 1."""
    count, size = int(rows.max()) + 1, []
    if alpha == 0:
        return torch.ones(count)
    for each in (inputs, weights):
        largest = torch.zeros(count).scatter_reduce(0, rows, each, "amax")
        size.append(largest.clamp(min=1e-5 * largest.max().clamp(min=1e-30)))
    factors = size[0]**alpha / size[1]**(1 - alpha)
    return factors / factors.log().mean().exp()  # about 1


def by_size(x: Tensor) -> Tensor:
    """The order of the channels of x (T, K) by their root mean square."""
    return x.square().mean(dim=0).argsort()


def apply(site: Site, factors: Tensor, order: Tensor | None = None) -> None:
    """Divide the site's input by factors and multiply its matrices; then put its channels in another order."""
    site.source.weight.div_(factors if site.source.weight.dim() == 1 else factors[:, None])
    for matrix in site.matrices:
        matrix.weight.mul_(factors[site.rows])
        if order is not None:
            matrix.weight.copy_(matrix.weight[:, order])
    for matrix in (site.source, site.gate) if order is not None else ():
        matrix.weight.copy_(matrix.weight[order])
