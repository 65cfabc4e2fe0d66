"""Text from a model: the sampler, prefill, decoding with a cache, and on CUDA a whole token as one graph.

A small model's kernels take less time than launching them one by one. So on CUDA all work of a token, from embedding
to draw, is captured as one CUDA graph and launched in one call. A replay repeats the same work on the same memory:
whatever changes from token to token is a tensor on the device, and nothing in the graph waits for the host.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lib.cli import UserError
from model import GPT, KVCache

NOT_FINITE = "the model's logits are not finite: its weights are broken, or their products overflow"

# ---------------------------------------------------------------- the sampler

def sample_next(logits: Tensor, seen: Tensor, keys: Tensor, temperature: float, top_k: int, top_p: float,
                repetition_penalty: float) -> Tensor:
    """Draw one token a row: logits (B, V) fp32, seen (B, T) the tokens so far, keys (B,) of random_keys -> (B,) int64.

    -1 where the largest logit is not finite. csrc/writer.cpp has the same function, step by step.
    """
    if repetition_penalty != 1.0:  # Keskar et al., 2019
        score = logits.gather(1, seen)
        score = torch.where(score > 0, score / repetition_penalty, score * repetition_penalty)
        logits = logits.scatter(1, seen, score)
    top, token = logits.max(dim=-1, keepdim=True)
    if temperature > 0:
        x, V = (logits - top) / temperature, logits.size(-1)  # subtracting first keeps the quotients finite
        if top_k < V or top_p < 1:
            largest = x.topk(min(top_k, V)).values  # in descending order
            if top_p < 1:  # nucleus (Holtzman et al., 2019): the likeliest token always stays
                p = largest.double().exp()
                largest = largest.masked_fill(p.cumsum(dim=-1) - p >= top_p * p.sum(dim=-1, keepdim=True), math.inf)
            x = x.masked_fill(x < largest.amin(dim=-1, keepdim=True), -math.inf)  # ties with the smallest one stay
        token = (x.double() + gumbel(keys, V)).argmax(dim=-1, keepdim=True)  # a draw by the softmax of x (Gumbel, 1954)
    return torch.where(top.isfinite(), token, -1).squeeze(1)


def random_keys(seed: int, rows: int, positions: range, device: torch.device) -> Tensor:
    """64 random bits for each position of each row: (rows, len(positions)) int64."""
    key = mix(torch.tensor(seed, device=device)) + torch.arange(rows, device=device)[:, None]
    return mix(mix(key) + torch.arange(positions.start, positions.stop, device=device))


def mix(z: Tensor) -> Tensor:
    """splitmix64 (Steele et al., 2014), in int64, whose products wrap around."""
    z = (z ^ z >> 30 & 2**34 - 1) * (0xbf58476d1ce4e5b9 - 2**64)
    z = (z ^ z >> 27 & 2**37 - 1) * (0x94d049bb133111eb - 2**64)
    return z ^ z >> 31 & 2**33 - 1


def gumbel(keys: Tensor, V: int) -> Tensor:
    """Gumbel numbers (B, V), each from 32 bits: murmur3's finalizer of the token, keyed twice by the row's key (B,)."""
    low, word = keys[:, None], 2**32 - 1
    x = (torch.arange(1, V + 1, device=keys.device) * 0x9e3779b9 ^ low) & word
    x = (x ^ x >> 16) * 0x85ebca6b + (low >> 32) & word
    x = (x ^ x >> 13) * 0xc2b2ae35 & word
    return -(-((x ^ x >> 16).double() + 0.5).mul(2.0**-32).log()).log()


# ---------------------------------------------------------------- prefill and decoding

def generate(model: GPT, idx: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
             eos: int | list[int] | None = None, seed: int | None = None,
             use_cache: bool = True, draft: GPT | None = None, most_guesses: int = 8) -> Iterator[Tensor]:
    """Continue the prompts idx (B, T) int64; an iterator over (B,) new tokens at a time. temperature 0 is greedy.

    The random numbers of a token follow from (seed, row, position), so that the text is the same on every device and
    with every backend, until rounding makes two logits swap; seed None: one of torch's.
    Generation ends when every row has produced `eos` (or one of several); a row that has repeats it. Past block_size
    the window restarts on the last half of a context. Keys and values are recomputed there, so the tokens are the same
    with and without the cache.

    A model with a new_writer checks up to most_guesses tokens in one pass: those of `draft`, a smaller one with its
    tokenizer, or what followed earlier in the text. Guesses do not change the tokens; model.guesses counts them.
    Raises UserError for a prompt or setting out of range, before any work, and for logits that are not finite.
    """
    T, block, vocab = idx.size(1), model.config.block_size, model.config.vocab_size
    ends = [end for end in ([eos] if isinstance(eos, int) else eos or []) if 0 <= end < vocab]
    for name, good, expected, got in (
            ("the prompt", 1 <= T <= block, f"1 to {block} tokens (the model's context)", T),
            ("temperature", 0 <= temperature < math.inf, "0 (greedy) or more", temperature),
            ("top-k", top_k is None or top_k >= 1, "1 or more", top_k),
            ("top-p", top_p is None or 0 < top_p <= 1, "more than 0, at most 1", top_p),
            ("repetition-penalty", repetition_penalty > 0, "more than 0", repetition_penalty),
            ("draft", draft is None or (model.new_writer and draft.new_writer and draft.config.vocab_size == vocab),
             f"an int8 model with {vocab} tokens and owlet's kernels on a CPU", type(draft).__name__)):
        if not good:
            raise UserError(f"{name}: expected {expected}, got {got}")
    seed = torch.randint(2**63 - 1, ()).item() if seed is None else seed
    settings = {  # fp32 can divide by these
        "temperature": temperature and min(max(temperature, 1e-30), 1e30), "top_k": min(top_k or vocab, vocab),
        "top_p": top_p or 1.0, "repetition_penalty": min(max(repetition_penalty, 1e-15), 1e15)}
    if use_cache and model.new_writer:
        return _write(model, idx, max_new_tokens, draft, seed=seed, stops=ends, most_guesses=most_guesses, **settings)
    return _decode(model, idx, max_new_tokens, ends, settings, seed, use_cache)


class Draw:
    """sample_next for B rows, of which those that have ended repeat the end-of-text token. done: (B,) bool."""

    def __init__(self, device: torch.device, B: int, ends: list[int], settings: dict) -> None:
        self.settings = settings
        self.stops = torch.tensor(ends, device=device) if ends else None
        self.done = torch.zeros(B, dtype=torch.bool, device=device)

    def __call__(self, logits: Tensor, seen: Tensor, keys: Tensor) -> Tensor:
        """logits (B, 1, V), seen (B, T), keys (B,) -> (B,) int64."""
        token = sample_next(logits[:, -1].float(), seen, keys, **self.settings)
        if self.stops is not None:
            token = torch.where(self.done, self.stops[0], token)
            self.done.logical_or_((token[:, None] == self.stops).any(dim=1))
        return token


@torch.inference_mode()
def _write(model: GPT, idx: Tensor, max_new_tokens: int, draft: GPT | None, **settings: object) -> Iterator[Tensor]:
    writer, seconds = model.new_writer(idx, max_new_tokens, draft, settings), 0.0
    try:
        while not writer.done:
            tokens, seconds = writer.write(seconds), 0.02  # one token, then 20 ms' worth
            if tokens is None:
                raise UserError(NOT_FINITE)
            yield from tokens.unbind(dim=1)
    finally:
        model.guesses = writer.guesses


@torch.inference_mode()
def _decode(model: GPT, idx: Tensor, max_new_tokens: int, ends: list[int], settings: dict, seed: int,
            use_cache: bool) -> Iterator[Tensor]:
    (B, T), block = idx.shape, model.config.block_size
    home = torch.device("cpu") if model.device.type == "mps" else model.device  # MPS has no float64 to draw with
    tokens = torch.empty(B, T + max_new_tokens, dtype=torch.long, device=home)
    tokens[:, :T] = idx
    draw, keys = Draw(home, B, ends, settings), random_keys(seed, B, range(T, T + max_new_tokens), home)
    cache = model.new_cache(B, min(block, T + max_new_tokens)) if use_cache else None
    graph = TokenGraph(model, cache, draw) if use_cache and can_capture(model) and max_new_tokens > 1 else None
    start = known = 0  # where the window begins, and up to where the cache holds it
    for end in range(T, T + max_new_tokens):
        if end - start > block:
            start = known = end - max(1, block // 2)
            if use_cache:
                cache.pos = 0
        if graph is not None and known > start:
            token = graph.next(keys[:, end - T])
        else:  # prefill, or a token without a graph
            logits, _ = model(tokens[:, known:end].to(model.device), cache=cache)
            token = draw(logits.to(home), tokens[:, start:end], keys[:, end - T])
            if graph is not None:
                graph.begin(tokens[:, start:end], token)
        known = end if use_cache else start
        if token.min() < 0:
            raise UserError(NOT_FINITE)
        tokens[:, end] = token
        yield token
        if draw.stops is not None and draw.done.all():
            return


# ---------------------------------------------------------------- a token as one CUDA graph

def can_capture(model: GPT) -> bool:
    return model.device.type == "cuda"


class StaticKVCache(KVCache):
    """A cache with its position on the device, so that one graph serves all. Attention masks what lies behind it."""

    def __init__(self, cache: KVCache) -> None:
        vars(self).update(vars(cache))  # the same memory
        self.kind, self.pos = type(cache), torch.tensor([cache.pos], device=cache.keys.device)
        for memory in (value for value in vars(cache).values() if isinstance(value, Tensor)):
            memory[:, :, :, cache.pos:] = 0  # unwritten memory may hold NaN, which a mask does not hide

    def end(self, T: int) -> int:
        return self.keys.size(3)

    def positions(self, T: int) -> Tensor:
        return self.pos

    def mask(self, T: int) -> Tensor:
        return (torch.arange(self.end(T), device=self.pos.device) <= self.pos)[None]

    def attend(self, *args: object) -> Tensor:
        return self.kind.attend(self, *args)


class TokenGraph:
    """Captured decoding into an empty cache: begin() after a pass over several tokens, then next() for each token."""

    def __init__(self, model: GPT, cache: KVCache, draw: Draw) -> None:
        _, B, _, length, _ = cache.keys.shape
        self.model, self.cache, self.draw = model, StaticKVCache(cache), draw
        self.token = torch.zeros(B, 1, dtype=torch.long, device=model.device)  # not in the cache yet
        self.seen = torch.zeros(B, length, dtype=torch.long, device=model.device)
        self.keys = torch.zeros_like(self.seen[:, 0])  # the random_keys of this position
        self.replay = capture(self)
        draw.done.zero_()

    def begin(self, window: Tensor, token: Tensor) -> None:
        """Continue after the window (B, T), which is in the cache, and the token (B,) drawn after it."""
        self.seen[:] = window[:, :1]  # fills what is unused: a token seen twice is penalised once
        self.seen[:, :window.size(1)] = window
        self.token[:, 0] = token
        self.cache.pos.fill_(window.size(1))

    def next(self, keys: Tensor) -> Tensor:
        self.keys.copy_(keys)
        self.replay()
        return self.token[:, 0].clone()

    def step(self) -> None:
        """The work that is captured."""
        self.seen.index_copy_(1, self.cache.pos, self.token)
        logits, _ = self.model(self.token, cache=self.cache)
        self.token.copy_(self.draw(logits, self.seen, self.keys)[:, None])


def capture(work: TokenGraph) -> Callable[[], None]:
    """A function that repeats the work's step on the GPU."""
    with torch.cuda.device(work.model.device):
        stream, main, graph = torch.cuda.Stream(), torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries allocate workspaces when first called
                work.step()
                work.cache.pos.zero_(), work.token.zero_()
        main.wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            work.step()
    return graph.replay
