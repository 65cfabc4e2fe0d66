"""A token as one CUDA graph: all work from embedding to draw is recorded once and launched in one call.

A small model's kernels take less time than launching them one by one. A recording repeats the same work on the same
memory: whatever changes from token to token is a tensor on the device, and nothing recorded waits for one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model import GPT, KVCache, StaticKVCache

BUCKET = 256  # a recording reads a fixed number of keys, most of them masked at first: one for each so many


class TokenGraph:
    """The next token of each stream, and the next: begin() behind a pass over several tokens, then next().

    choose(logits (B, 1, V), seen (B, length)) -> (B,) draws with the generator and keeps `done` (B,) in place.
    """

    def __init__(self, model: GPT, cache: KVCache, choose: Callable[[Tensor, Tensor], Tensor], done: Tensor,
                 generator: torch.Generator | None) -> None:
        _, B, _, length, _ = cache.keys.shape
        self.model, self.cache, self.choose, self.done = model, cache, choose, done
        self.generator = generator or torch.cuda.default_generators[model.device.index]
        self.static = StaticKVCache(cache)
        self.token = torch.zeros(B, 1, dtype=torch.long, device=model.device)  # the last one, not in the cache yet
        self.seen = torch.zeros(B, length, dtype=torch.long, device=model.device)
        self.bucket = length if getattr(model, "decoder", None) else BUCKET  # int8's own decoder reads up to pos alone
        self.replays: dict[int, Callable[[], None]] = {}
        self.record = recorder(model.device, self.generator)

    def begin(self, window: Tensor, token: Tensor) -> None:
        """Go on behind the window (B, T), which is in the cache, and the token (B,) drawn after it."""
        self.seen[:] = window[:, :1]  # fills what is unused: seen twice is penalised like once
        self.seen[:, :window.size(1)] = window
        self.token[:, 0] = token
        self.static.pos.fill_(self.cache.pos)

    def next(self) -> Tensor:
        self.cache.pos += 1
        self.static.visible = min(math.ceil(self.cache.pos / self.bucket) * self.bucket, self.seen.size(1))
        if self.static.visible not in self.replays:
            self.replays[self.static.visible] = self.record(self.rehearse, self.step)
        self.replays[self.static.visible]()
        return self.token[:, 0].clone()

    def step(self) -> None:
        """What is recorded."""
        self.seen.index_copy_(1, self.static.pos, self.token)
        logits, _ = self.model(self.token, cache=self.static)
        self.token.copy_(self.choose(logits, self.seen)[:, None])

    def rehearse(self) -> None:
        """A step that leaves nothing behind but this position's keys and values, as the next step will."""
        state, drawn = (self.token, self.seen, self.done, self.static.pos), self.generator.get_state()
        before = [tensor.clone() for tensor in state]
        self.step()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        self.generator.set_state(drawn)


def recorder(device: torch.device, generator: torch.Generator) -> Callable[..., Callable[[], None]]:
    """record(rehearse, step) -> replay. Its recordings share a stream, and memory for what lies between the first and
    the last operation of each: they are never replayed side by side.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(rehearse: Callable[[], None], step: Callable[[], None]) -> Callable[[], None]:
        main, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries make workspaces when first called
                    rehearse()
                graph.register_generator_state(generator)  # each replay draws on from where the generator is
            main.wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step()
        return graph.replay

    return record
