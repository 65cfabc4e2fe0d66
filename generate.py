"""Text from a model: the sampler, prefill, decoding with a cache, and on CUDA a whole token as one graph.

A small model's kernels take less time than launching them one by one. So on CUDA all work of a token, from embedding
to draw, is captured as one CUDA graph and launched in one call. A replay repeats the same work on the same memory:
whatever changes from token to token is a tensor on the device, and nothing in the graph waits for the host.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

from cli import UserError

import torch
from torch import Tensor

from model import GPT, KVCache

# A graph reads a fixed number of keys and masks those not there yet: one graph for each multiple of this
BUCKET = 256  # docs/log.md, "Token as one CUDA graph"


# ---------------------------------------------------------------- the sampler

def sample_next(logits: Tensor, seen: Tensor, temperature: float, top_k: int | None, top_p: float | None,
                repetition_penalty: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token a row: logits (B, V) fp32, seen (B, T) the tokens so far -> (B,) int64."""
    if repetition_penalty != 1.0:  # Keskar et al., 2019
        score = logits.gather(1, seen)
        score = torch.where(score > 0, score / repetition_penalty, score * repetition_penalty)
        logits = logits.scatter(1, seen, score)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # in this order no quotient is infinite or NaN
    order, size = None, logits.size(-1)
    if (top_k or size) < size or (top_p or 1) < 1:
        logits, order = logits.topk(min(top_k or size, size))  # falling
    probabilities = logits.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    mass = cumulative[:, -1:]
    if (top_p or 1) < 1:  # nucleus (Holtzman et al., 2019): the likeliest token always stays
        mass = cumulative.masked_fill(cumulative - probabilities >= top_p, 0).amax(dim=-1, keepdim=True)
    # One random number a row, in (0, 1], finds its token. torch.multinomial waits for the GPU and cannot be captured;
    # a random number for each token takes a fifth of the time of a model with 50,000 (docs/log.md, "Drawing a token").
    drawn = (1 - torch.rand(mass.shape, device=mass.device, generator=generator)) * mass
    token = torch.searchsorted(cumulative, drawn)
    return (token if order is None else order.gather(1, token)).squeeze(1)


# ---------------------------------------------------------------- prefill and decoding

def generate(model: GPT, idx: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
             eos: int | list[int] | None = None, generator: torch.Generator | None = None,
             use_cache: bool = True, draft: GPT | None = None, most_guesses: int = 8) -> Iterator[Tensor]:
    """Continue the prompts idx (B, T) int64; an iterator over (B,) new tokens at a time.

    temperature 0 is greedy. Generation ends when every row has produced `eos` (or one of several); a row that has
    repeats it. Past block_size the window restarts on the last half of a context. Keys and values are recomputed
    there, so the tokens are the same with and without the cache (an int8 cache rounds).

    An int8 model's text is written by csrc/writer.cpp on a CPU, with random numbers of its own. The model checks up to
    most_guesses tokens in one pass: those of `draft`, a smaller int8 model with the same tokenizer, or what followed
    earlier in the text. Guesses do not change the tokens. model.guesses says how many there were.
    Raises UserError, before any work, for a prompt or setting out of range.
    """
    T, block, vocab = idx.size(1), model.config.block_size, model.config.vocab_size
    ends = [end for end in ([eos] if isinstance(eos, int) else eos or []) if 0 <= end < vocab]  # others never come
    for name, good, expected, got in (
            ("the prompt", 1 <= T <= block, f"1 to {block} tokens (the model's context)", T),
            ("temperature", 0 <= temperature < math.inf, "0 (greedy) or more", temperature),
            ("top-k", top_k is None or top_k >= 1, "1 or more", top_k),
            ("top-p", top_p is None or 0 < top_p <= 1, "more than 0, at most 1", top_p),
            ("repetition-penalty", repetition_penalty > 0, "more than 0", repetition_penalty),
            ("draft", draft is None or (writes_in_cpp(draft) and draft.config.vocab_size == vocab),
             f"an int8 model with {vocab} tokens and owlet's kernels on a CPU", type(draft).__name__)):
        if not good:
            raise UserError(f"{name}: expected {expected}, got {got}")
    settings = {  # fp32 cannot divide by less than 1e-38; all are as good as their limits long before these
        "temperature": temperature and min(max(temperature, 1e-30), 1e30), "top_k": top_k and min(top_k, vocab),
        "top_p": top_p, "repetition_penalty": min(max(repetition_penalty, 1e-15), 1e15)}
    if use_cache and writes_in_cpp(model):
        seed = torch.randint(2**63 - 1, (), generator=generator).item()
        return _write(model, idx, max_new_tokens, draft, seed=seed, stops=ends, most_guesses=most_guesses,
                      **settings | {"top_k": settings["top_k"] or 0, "top_p": top_p or 1.0})
    return _decode(model, idx, max_new_tokens, Draw(model.device, idx.size(0), ends, **settings, generator=generator),
                   use_cache)


def writes_in_cpp(model: GPT) -> bool:
    """Whether this is an int8 model with a decoder (int8.py) on a CPU."""
    return model.device.type == "cpu" and getattr(model, "decoder", None) is not None


class Draw:
    """sample_next for B rows, of which those that have ended repeat the end-of-text token. done: (B,) bool."""

    def __init__(self, device: torch.device, B: int, ends: list[int], **settings: object) -> None:
        self.settings, self.sample = settings, partial(sample_next, **settings)
        self.stops = torch.tensor(ends, device=device) if ends else None
        self.done = torch.zeros(B, dtype=torch.bool, device=device)

    def __call__(self, logits: Tensor, seen: Tensor) -> Tensor:
        """logits (B, 1, V), seen (B, T) -> (B,) int64."""
        token = self.sample(logits[:, -1].float(), seen)
        if self.stops is not None:
            token = torch.where(self.done, self.stops[0], token)
            self.done.logical_or_((token[:, None] == self.stops).any(dim=1))
        return token


@torch.inference_mode()
def _write(model: GPT, idx: Tensor, max_new_tokens: int, draft: GPT | None, **settings: object) -> Iterator[Tensor]:
    writer, start, seconds = model.new_writer(idx, max_new_tokens, draft, settings), idx.size(1), 0.0
    try:
        while start < writer.tokens.size(1) and not writer.ended:
            end, seconds = writer.write(seconds), 0.02  # the first token alone, then what a reader takes as one
            yield from writer.tokens[:, start:end].unbind(dim=1)
            start = end
    finally:
        model.guesses = writer.guessed, writer.right


@torch.inference_mode()
def _decode(model: GPT, idx: Tensor, max_new_tokens: int, draw: Draw, use_cache: bool) -> Iterator[Tensor]:
    (B, T), block = idx.shape, model.config.block_size
    tokens = torch.empty(B, T + max_new_tokens, dtype=torch.long, device=model.device)
    tokens[:, :T] = idx
    cache = model.new_cache(B, min(block, T + max_new_tokens)) if use_cache else None
    graph = take_graph(model, cache, draw) if cache is not None and can_capture(cache) else None
    if graph is not None:
        cache, draw = graph.cache, graph.draw
    try:
        start = 0  # of the window
        for end in range(T, T + max_new_tokens):
            if end - start > block:
                start = end - max(1, block // 2)
                if cache is not None:
                    cache.pos = 0
            if graph is not None and cache.pos:
                token = graph.next()
            else:  # prefill, or a token without a graph
                known = start + (cache.pos if cache is not None else 0)
                logits, _ = model(tokens[:, known:end], cache=cache)
                token = draw(logits, tokens[:, start:end])
                if graph is not None:
                    graph.begin(tokens[:, start:end], token)
            tokens[:, end] = token
            yield token
            if draw.stops is not None and draw.done.all():
                return
    finally:
        if graph is not None:
            graph.give_back()


# ---------------------------------------------------------------- a token as one CUDA graph

def can_capture(cache: KVCache) -> bool:
    """Whether generating with this cache makes a token one CUDA graph. An int8 cache has scales that graphs lack."""
    return cache.keys.is_cuda and type(cache) is KVCache


class StaticKVCache(KVCache):
    """The memory of a cache, with the position on the device, so that one graph serves every position.

    Decodes one token per sequence. Attention reads the first `visible` positions and masks those after pos.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values = cache.keys, cache.values
        for memory in (self.keys, self.values):
            memory[:, :, :, cache.pos:] = 0  # unwritten memory may hold NaN, which a mask does not hide
        self.pos = torch.tensor([cache.pos], device=cache.keys.device)
        self.visible = cache.keys.size(3)

    def end(self, T: int) -> int:
        return self.visible

    def positions(self, T: int) -> Tensor:
        return self.pos

    def mask(self, T: int) -> Tensor:
        return (torch.arange(self.visible, device=self.pos.device) <= self.pos)[None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.pos, k)
        values.index_copy_(2, self.pos, v)
        return keys[:, :, :self.visible], values[:, :, :self.visible]


def take_graph(model: GPT, cache: KVCache, draw: Draw) -> "TokenGraph":
    """The graph that the last generation left on the model if it fits this one, else a new one.

    It is taken off the model while in use: two generations at once have a graph each.
    """
    weights = tuple((t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers()))
    settings = tuple((name, value) for name, value in draw.settings.items() if name != "generator")
    key = (cache.keys.shape, weights, settings, None if draw.stops is None else tuple(draw.stops.tolist()))
    graph = model.__dict__.pop("token_graph", None)
    if graph is None or graph.key != key:
        graph = TokenGraph(model, cache, draw, key)
    graph.start(draw.settings["generator"])
    return graph


class TokenGraph:
    """Captured decoding: begin() after a pass over several tokens, then next() for each token.

    It keeps the cache and the Draw it was captured with, and a generator of its own, which takes the state of the
    caller's at the start and hands it back at the end.
    """

    def __init__(self, model: GPT, cache: KVCache, draw: Draw, key: tuple) -> None:
        _, B, _, length, _ = cache.keys.shape
        self.model, self.cache, self.draw, self.key = model, cache, draw, key
        self.generator = torch.Generator(model.device)
        draw.sample = partial(draw.sample, generator=self.generator)
        self.static = StaticKVCache(cache)
        self.token = torch.zeros(B, 1, dtype=torch.long, device=model.device)  # the last one, not in the cache yet
        self.seen = torch.zeros(B, length, dtype=torch.long, device=model.device)
        self.bucket = length if getattr(model, "decoder", None) else BUCKET  # csrc/cuda/decoder.cu reads up to pos
        self.replays: dict[int, Callable[[], None]] = {}
        self.capture = capturer(model.device, self.generator)

    def start(self, generator: torch.Generator | None) -> None:
        self.theirs = generator or torch.cuda.default_generators[self.model.device.index]
        self.generator.set_state(self.theirs.get_state())
        self.draw.done.zero_()
        self.cache.pos = 0

    def give_back(self) -> None:
        self.theirs.set_state(self.generator.get_state())
        self.model.token_graph = self

    def begin(self, window: Tensor, token: Tensor) -> None:
        """Continue after the window (B, T), which is in the cache, and the token (B,) drawn after it."""
        self.seen[:] = window[:, :1]  # fills what is unused: a token seen twice is penalised once
        self.seen[:, :window.size(1)] = window
        self.token[:, 0] = token
        self.static.pos.fill_(self.cache.pos)

    def next(self) -> Tensor:
        self.cache.pos += 1
        self.static.visible = min(math.ceil(self.cache.pos / self.bucket) * self.bucket, self.seen.size(1))
        if self.static.visible not in self.replays:
            self.replays[self.static.visible] = self.capture(self.warm_up, self.step)
        self.replays[self.static.visible]()
        return self.token[:, 0].clone()

    def step(self) -> None:
        """The work that is captured."""
        self.seen.index_copy_(1, self.static.pos, self.token)
        logits, _ = self.model(self.token, cache=self.static)
        self.token.copy_(self.draw(logits, self.seen)[:, None])

    def warm_up(self) -> None:
        """A step whose only trace is this position's keys and values, which the next step writes again."""
        state, drawn = (self.token, self.seen, self.draw.done, self.static.pos), self.generator.get_state()
        before = [tensor.clone() for tensor in state]
        self.step()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        self.generator.set_state(drawn)


def capturer(device: torch.device, generator: torch.Generator) -> Callable[..., Callable[[], None]]:
    """capture(warm_up, step) -> replay. The graphs share a stream and temporary memory: no two replay at once."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(warm_up: Callable[[], None], step: Callable[[], None]) -> Callable[[], None]:
        main, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries allocate workspaces when first called
                    warm_up()
                graph.register_generator_state(generator)  # each replay draws on from the generator's state
            main.wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step()
        return graph.replay

    return capture
