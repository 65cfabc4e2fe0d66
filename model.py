"""The decoder: today's small GPT, in the form Hugging Face calls Qwen3 (or Llama, without QK-norm).

Pre-norm blocks of grouped-query attention with rotary positions and SwiGLU, RMSNorm, no biases.
Modules carry transformers' own names, so a state dict *is* a Hugging Face checkpoint.

B: sequences, T: tokens of each, C: n_embd, nh: heads, hd: head_dim.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {  # docs/log.md, "Sizes": 0.9M, 11M, 26M and 85M parameters with 256 tokens
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
    "base": {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 512},
    "medium": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
}


@dataclass
class GPTConfig:
    vocab_size: int = 256
    block_size: int = 128  # longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention; None: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    n_hidden: int | None = None  # SwiGLU width; None: 8/3 n_embd, rounded up to a multiple of 64
    qk_norm: bool = True  # True: Qwen3; False: Llama
    tie_embeddings: bool = True
    rope_theta: float = 1_000.0  # a tenth of the usual: contexts here are short (docs/log.md, "RoPE base")
    norm_eps: float = 1e-6
    dropout: float = 0.0
    bos: int | None = None  # begin- and end-of-text tokens, if the tokenizer has some
    eos: int | list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "n_hidden"):
            value, most = getattr(self, name), 2**10 if name == "n_layer" else 2**20
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name}: expected {'1 or more' if value < 1 else f'at most {most}'}, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 or more and less than 1, got {self.dropout}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd: expected a multiple of n_head = {self.n_head}, got {self.n_embd}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or 64 * math.ceil(8 / 3 * self.n_embd / 64)
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head: expected a divisor of n_head = {self.n_head}, got {self.n_kv_head}")
        if self.n_head * self.head_dim > 2**20 or self.block_size * self.head_dim > 2**27:
            raise ValueError(f"head_dim: expected less with {self.n_head} heads and {self.block_size} positions, "
                             f"got {self.head_dim}")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps: expected 0 or more and less than 1, got {self.norm_eps}")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta: expected more than 0, got {self.rope_theta}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: rotary positions need an even number, got {self.head_dim}")

    def check_fits(self, tokens: int) -> None:
        if tokens > self.block_size:
            raise ValueError(f"{tokens} tokens do not fit the model's context of {self.block_size}")

    @property
    def ends(self) -> list[int]:
        """The end-of-text tokens."""
        return self.eos if isinstance(self.eos, list) else [] if self.eos is None else [self.eos]


class KVCache:
    """Keys and values of the tokens seen so far, each (n_layer, B, n_kv_head, length, head_dim)."""

    def __init__(self, config: GPTConfig, batch_size: int, length: int | None = None,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, length or config.block_size, config.head_dim)
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.pos = 0  # tokens held; GPT.forward moves it on

    def end(self, T: int) -> int:
        """How many tokens attention reads once T more are in."""
        return self.pos + T

    def positions(self, T: int) -> slice:
        """Where the next T tokens go."""
        return slice(self.pos, self.end(T))

    def mask(self, T: int) -> Tensor | None:
        """Which tokens the next T may attend to, (T, end) bool; None: all up to themselves."""
        if self.pos and T > 1:  # several new tokens behind a past: the causal mask is not square
            return torch.ones(T, self.end(T), dtype=torch.bool, device=self.keys.device).tril(self.pos)
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Append k, v (B, n_kv_head, T, hd), and let q (B, n_head, T, hd) attend to all so far: (B, n_head, T, hd)."""
        here, end = self.positions(k.size(2)), self.end(k.size(2))
        self.keys[layer, :, :, here] = k
        self.values[layer, :, :, here] = v
        return attention(q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end], mask)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v of q (B, n_head, T, hd) and k, v (B, n_kv_head, S, hd); mask None: causal."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1,
                                          enable_gqa=q.size(1) != k.size(1))


def rope_table(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, (block_size, head_dim / 2) (Su et al., 2021)."""
    cpu = torch.device("cpu")  # a model on the meta device needs its tables too: only weights are loaded into it
    exponent = torch.arange(0, config.head_dim, 2, device=cpu).float() / config.head_dim
    positions = torch.arange(config.block_size, device=cpu).float()
    angles = torch.outer(positions, 1.0 / config.rope_theta**exponent)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (x[i], x[i + head_dim/2]) of each head: x (B, nh, T, hd), cos (T, hd / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Zhang and Sennrich, 2019. The weight takes x's dtype: one fused operation in bf16 under a CPU's autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention; each key/value head serves n_head / n_kv_head query heads."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, q_width, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=False)
        if config.qk_norm:  # keeps attention logits bounded (Henry et al., 2020)
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.config.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T, hd)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if self.training and self.config.dropout:
            # drops a head's whole value at a position; dropping single attention weights would take SDPA's slow path
            v = F.dropout1d(v.flatten(0, 1), self.config.dropout).view_as(v)
        y = attention(q, k, v, mask) if cache is None else cache.attend(self.layer, q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.config = config

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def drop(self, y: Tensor) -> Tensor:
        """Drop channels of y (B, T, C), each at all positions of a sequence (Gal and Ghahramani, 2016)."""
        if not (self.training and self.config.dropout):
            return y
        return F.dropout1d(y.mT, self.config.dropout).mT


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # drawing into a meta tensor imports parts of torch.compile, which takes a second
            super().reset_parameters()


class GPT(nn.Module):
    new_writer = None  # an int8 model on a CPU has one, which writes whole texts (generate.py)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(config.vocab_size, config.n_embd),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            "norm": RMSNorm(config.n_embd, eps=config.norm_eps),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():  # GPT-2's (docs/log.md, "Initialization")
            if parameter.dim() == 2 and not parameter.is_meta:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))  # 2 n_layer of them add to the stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if adds else 0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """idx, targets (B, T) int64 -> logits (B, T, vocab_size), mean loss in nats (or None).

        With a cache, idx continues what the cache holds. With a cache and without targets, only the last position's
        logits (B, 1, vocab_size) are computed. Raises ValueError where the tokens do not fit the context.
        """
        T = idx.size(1)
        self.config.check_fits(cache.end(T) if cache is not None else T)
        positions, mask = (cache.positions(T), cache.mask(T)) if cache is not None else (slice(T), None)
        cos, sin = self.cos[positions], self.sin[positions]  # (T, hd / 2)
        x = self.model.embed_tokens(idx)  # (B, T, C)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.pos += T
            if targets is None:
                x = x[:, -1:]
        logits = self.lm_head(self.model.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache for `length` tokens of each sequence, on the model's device and in its dtype."""
        return KVCache(self.config, batch_size, length, self.device, self.model.norm.weight.dtype)

    @property
    def device(self) -> torch.device:
        return self.cos.device

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Forward and backward at full context: 6 N + 12 L nh hd T (Chowdhery et al., 2022, app. B)."""
        c = self.config
        matmul_params = self.num_params() - (0 if c.tie_embeddings else c.vocab_size * c.n_embd)
        return 6 * matmul_params + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    def estimate_mfu(self, tokens_per_second: float, peak_flops: float) -> float:
        """Model FLOPs utilisation: share of `peak_flops` (FLOP/s, all devices together) in use."""
        return self.flops_per_token() * tokens_per_second / peak_flops
