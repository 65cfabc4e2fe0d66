"""Outliers: a few channels of a published model's activations are a hundred times as large as the others, and one int8
scale for all of a token rounds the others away. Three remedies, all exact in fp32 and each used where it helps:

Smoothing (Xiao et al., 2022): scales move from large channels into the weights that they meet, before these are
rounded. What makes a channel smaller is the weight of the norm before it, or the rows of v_proj and up_proj.
Slices: the hidden channels are put in the order of their size, and each quarter gets scales of its own.
A fine head: its activations take two rounds of int8. A tied head cannot be smoothed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from generate import generate
from int8 import quantize_rows, quantize_tokens
from model import GPT

# docs/log.md, "Smoothing"
ALPHAS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8)  # migration strengths that are tried
CLEARLY = 0.9  # a strength is taken if the error falls below this part of what it was
COARSE = 0.02  # a relative error above this, after smoothing, calls for slices and the fine head
SLICES = 4
TEXTS, LENGTH = 16, 256  # number and length of the texts that the model writes to calibrate with
TRIED = 256  # tokens on which the strengths are tried


@dataclass
class Site:
    """Matrices that take the same input, and what scales its channels."""

    matrices: list[nn.Linear]
    source: nn.Module | None
    rows: Tensor  # (K,) int64: the row of the source that scales each channel of the input
    gate: nn.Linear | None = None  # given where the channels may be reordered: it makes them together with the source

    @property
    def weight(self) -> Tensor:
        weights = [matrix.weight for matrix in self.matrices]
        return torch.cat(weights) if len(weights) > 1 else weights[0]  # no copy of a head


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
def smooth(model: GPT, tokens: Tensor | None = None) -> tuple[dict, str]:
    """Change an fp32 model in place, so that int8 loses less; its logits stay.

    tokens (n, T) int64: text to learn the channels' sizes from; None: the model writes it. Returns the options for
    save_quantized, and a line of text on what each remedy gained.
    """
    inputs = observe(model, written(model) if tokens is None else tokens)
    found = sites(model)
    trials = [search(site, *seen) for site, seen in zip(found, inputs, strict=True)]
    rounds = [[trial.error_before for trial in trials], [trial.error for trial in trials]]
    downs = [i for i, site in enumerate(found) if site.gate is not None]
    coarse = sum(trials[i].error for i in downs) > COARSE * len(downs)
    slices = SLICES if model.config.n_hidden % SLICES == 0 and coarse else 1
    for i, (site, seen) in enumerate(zip(found, inputs, strict=True)):
        if site.gate is not None and slices > 1:
            trials[i] = search(site, *seen, slices)
            apply(site, trials[i].factors, by_size(seen[1] / trials[i].factors))
        elif site.source is not None:
            apply(site, trials[i].factors)
    fine_head = trials[-1].error > COARSE
    before, after = (sum(errors) / len(errors) for errors in rounds)
    said = f"int8 products are {before:.1%} off, after smoothing {after:.1%}"
    if slices > 1:
        then = [sum(errors[i] for i in downs) / len(downs) for errors in (rounds[1], [trial.error for trial in trials])]
        said += f"; down_proj in {slices} slices: {then[0]:.1%} -> {then[1]:.1%}"
    return {"slices": slices, "fine_head": fine_head}, said + "; the head takes its input in two parts" * fine_head


def written(model: GPT) -> Tensor:
    """Texts that the model writes: (TEXTS, up to LENGTH) int64."""
    generator, length = torch.Generator().manual_seed(0), min(LENGTH, model.config.block_size)
    first = torch.randint(0, model.config.vocab_size, (TEXTS, 1), generator=generator)
    tokens = generate(model, first, length - 1, seed=0)
    return torch.cat([first, *(token[:, None] for token in tqdm(
        tokens, "writing text to calibrate with", total=length - 1, delay=2, leave=False, disable=None))], dim=1)


def observe(model: GPT, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each site, the largest size of each input channel (K,), and at most TRIED tokens of its input (TRIED, K)."""
    seen, hooks, every = [], [], math.ceil(tokens.numel() / TRIED)
    taken = math.ceil(tokens.size(1) / every)  # from each text
    for site in sites(model):
        largest = torch.zeros(len(site.rows))
        some = torch.empty(len(tokens) * taken, len(site.rows))

        def see(matrix: nn.Linear, args: tuple[Tensor], largest: Tensor = largest,
                free: Iterator[Tensor] = iter(some.split(taken))) -> None:  # noqa: B008 (one for each site)
            x = args[0].flatten(0, -2)
            torch.maximum(largest, x.abs().amax(dim=0), out=largest)
            next(free).copy_(x[::every])

        seen.append((largest, some))
        hooks.append(site.matrices[0].register_forward_pre_hook(see))
    for text in tqdm(tokens, "calibrating", delay=2, leave=False, disable=None):
        model(text[None])
    for hook in hooks:
        hook.remove()
    return seen


@dataclass
class Trial:
    error_before: float  # relative error of the int8 product without factors
    error: float  # ... with them
    factors: Tensor  # for the rows of the source


def search(site: Site, largest: Tensor, some: Tensor, slices: int = 1) -> Trial:
    """The alpha with the least error of the site's int8 product."""
    weight, found = site.weight, []
    for alpha in ALPHAS if site.source is not None else (0.0,):
        factors = balance(largest, torch.linalg.vector_norm(weight, math.inf, dim=0), site.rows, alpha)
        x, order = some / factors[site.rows], torch.arange(len(site.rows))
        if slices > 1:
            order = by_size(x)
        q, x_scale = quantize_tokens(x[:, order].unflatten(1, (slices, -1)))
        rounded, sums = (q * x_scale).flatten(1), torch.zeros(2)
        for rows in weight.split(4096):  # copies of a whole head would take as much memory as the model
            w_q, scale = quantize_rows((rows * factors[site.rows])[:, order].reshape(len(rows) * slices, -1))
            exact = some @ rows.T
            sums += torch.stack([rounded @ (w_q * scale[:, None]).view_as(rows).T - exact, exact]).square().sum((1, 2))
        found.append(((sums[0] / sums[1].clamp(min=1e-30)).sqrt().item(), factors))
    best, as_is = min(found, key=lambda each: each[0]), found[0]
    return Trial(as_is[0], *(best if best[0] < CLEARLY * as_is[0] else as_is))


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
