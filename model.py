"""The decoder: today's small GPT, in the form Hugging Face calls Qwen3 (or Llama, without QK-norm).

Pre-norm blocks of grouped-query attention with rotary positions and SwiGLU, RMSNorm, no biases.
Modules carry transformers' own names, so a state dict *is* a Hugging Face checkpoint.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpoint import read_config, read_tensors, write_json, write_tensors
from cli import UserError


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
    rope_theta: float = 1_000.0  # a tenth of what is usual: contexts here are short
    norm_eps: float = 1e-6
    dropout: float = 0.0
    bos: int | None = None  # begin- and end-of-text tokens, of models that come with some
    eos: int | list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "n_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected 1 or more, got {value}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: expected 0 or more and less than 1, got {self.dropout}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(f"n_embd: expected a multiple of n_head = {self.n_head}, got {self.n_embd}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or 64 * math.ceil(8 / 3 * self.n_embd / 64)
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head: expected a divisor of n_head = {self.n_head}, got {self.n_kv_head}")
        if self.head_dim % 2:
            raise UserError(f"head_dim: rotary positions need an even number, got {self.head_dim}")

    def to_hf(self) -> dict:
        """config.json, readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
        return {
            "architectures": ["Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"],
            "model_type": "qwen3" if self.qk_norm else "llama",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.block_size,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_kv_head,
            "head_dim": self.head_dim,
            "hidden_size": self.n_embd,
            "intermediate_size": self.n_hidden,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "attention_bias": False,
            "attention_dropout": self.dropout,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
            "dtype": "float32",
            "torch_dtype": "float32",
        }

    @classmethod
    def from_hf(cls, hf: dict) -> "GPTConfig":
        """From config.json's fields; refuses by name whatever this decoder does not compute.

        Dropout is a matter of training, not of the model: it is 0 until somebody asks for it.
        """
        hf = {name: value for name, value in hf.items() if value is not None}

        def refuse(feature: str, value: object) -> None:
            raise UserError(f"config.json: {feature} = {value!r} is not supported")

        if hf.get("model_type") not in ("qwen3", "llama"):
            refuse("model_type", hf.get("model_type"))
        for name in ("rope_parameters", "rope_scaling"):
            rope = hf.get(name, {})
            if rope.get("rope_type", rope.get("type", "default")) != "default":
                refuse("rope scaling", rope)
        qwen = hf["model_type"] == "qwen3"
        only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                "use_sliding_window": False, "partial_rotary_factor": 1.0}
        for feature, expected in only.items():
            if hf.get(feature, expected) != expected:
                refuse(feature, hf[feature])
        if set(hf.get("layer_types") or ["full_attention"]) != {"full_attention"}:
            refuse("layer_types", hf["layer_types"])
        try:
            return cls(
                vocab_size=hf["vocab_size"],
                block_size=hf["max_position_embeddings"],
                n_layer=hf["num_hidden_layers"],
                n_head=hf["num_attention_heads"],
                n_kv_head=hf.get("num_key_value_heads"),
                head_dim=hf.get("head_dim", 128 if qwen else None),  # transformers' defaults
                n_embd=hf["hidden_size"],
                n_hidden=hf["intermediate_size"],
                qk_norm=qwen,
                tie_embeddings=hf.get("tie_word_embeddings", False),
                rope_theta=hf.get("rope_parameters", {}).get("rope_theta", hf.get("rope_theta", 10_000.0)),
                norm_eps=hf.get("rms_norm_eps", 1e-6),
                bos=hf.get("bos_token_id"),
                eos=hf.get("eos_token_id"),
            )
        except KeyError as error:
            raise UserError(f"config.json: {error} is missing") from None


class KVCache:
    """Keys and values of the tokens seen so far, each (n_layer, B, n_kv_head, length, head_dim)."""

    def __init__(self, config: GPTConfig, batch_size: int, length: int | None = None,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 empty: Callable[..., Tensor] = torch.empty) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, length or config.block_size, config.head_dim)
        self.keys, self.values = (empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.pos = 0  # tokens held; GPT.forward moves it on

    @property
    def recordable(self) -> bool:
        """Whether generating with this cache makes a token one CUDA graph."""
        return self.keys.is_cuda

    def end(self, T: int) -> int:
        """How many tokens attention reads once T more are in."""
        return self.pos + T

    def positions(self, T: int) -> slice:
        """Where the next T tokens go."""
        return slice(self.pos, self.end(T))

    def mask(self, T: int) -> Tensor | None:
        """Which of all tokens the next T see, (T, end) bool; None: each those before it."""
        if self.pos and T > 1:  # several new tokens behind a past: the causal mask is not square
            return torch.ones(T, self.end(T), dtype=torch.bool, device=self.keys.device).tril(self.pos)
        return None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, n_kv_head, T, head_dim); return all keys and values so far."""
        here, end = self.positions(k.size(2)), self.end(k.size(2))
        self.keys[layer, :, :, here] = k
        self.values[layer, :, :, here] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class StaticKVCache(KVCache):
    """A cache's memory with the position on the device, so that one recording of the work (cuda_graph.py) serves
    every position: a token a stream at a time, of `visible` tokens read those beyond pos masked.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values = cache.keys, cache.values
        for memory in (self.keys, self.values):
            memory[:, :, :, cache.pos:] = 0  # a mask does not hide NaN, which memory never written may hold
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


def rope_table(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, (block_size, head_dim / 2) (Su et al., 2021)."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    positions = torch.arange(config.block_size).float()
    angles = torch.outer(positions, 1.0 / config.rope_theta**exponent)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (x[i], x[i + head_dim/2]) of each head: x (B, nh, T, hd), cos (T, hd / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Zhang and Sennrich, 2019. Under a CPU's autocast the weight follows x into bf16: one fused operation."""

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
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(self.attend(q, k, v, cos, sin, mask, cache))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
               cache: KVCache | None) -> Tensor:
        """All between the projections: q, k, v (B, T, heads * hd) -> (B, T, n_head * hd)."""
        B, T, _ = q.shape
        q, k, v = (y.view(B, T, -1, self.config.head_dim) for y in (q, k, v))  # (B, T, nh, hd)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T, hd)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, n_kv_head, past + T, hd)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
            dropout_p=self.config.dropout if self.training else 0.0,
            enable_gqa=self.config.n_kv_head != self.config.n_head)
        return y.transpose(1, 2).reshape(B, T, -1)


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
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            "norm": RMSNorm(config.n_embd, eps=config.norm_eps),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # every block starts as the identity
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """idx, targets (B, T) int64 -> logits (B, T, vocab_size), mean loss in nats (or None).

        With a cache, idx continues what the cache holds; without targets, only the last position's
        logits (B, 1, vocab_size) are computed then.
        """
        T = idx.size(1)
        self.check_fits(cache.end(T) if cache is not None else T)
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
        """An empty cache for this many tokens of each stream, where the model is and in its weights' type."""
        return KVCache(self.config, batch_size, length, self.device, self.model.norm.weight.dtype)

    def check_fits(self, tokens: int) -> None:
        if tokens > self.config.block_size:
            raise UserError(f"{tokens} tokens do not fit the model's context of {self.config.block_size}")

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

    @classmethod
    def from_pretrained(cls, folder: Path | str, dropout: float = 0.0) -> "GPT":
        """Load a folder written by owlet or transformers (Qwen3, Llama), as fp32, in eval mode."""
        folder = Path(folder)
        hf = read_config(folder)
        if "quantization_config" in hf:
            raise UserError(f"{folder}: a quantized folder; expected an fp32 one")
        config = replace(GPTConfig.from_hf(hf), dropout=dropout)
        state = {name: tensor.float() for name, tensor in read_tensors(folder).items()
                 if not name.endswith("rotary_emb.inv_freq")}  # older Llamas store what is computed anyway
        if config.tie_embeddings:
            state["lm_head.weight"] = state.get("model.embed_tokens.weight", torch.empty(0))
        with Uninitialised():
            model = cls(config)
        check_tensors(folder, model.state_dict(), state)
        model.load_state_dict(state, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json, generation_config.json and model.safetensors (fp32), each atomically."""
        write_pretrained(Path(folder), self.state_dict(), self.config)


def write_pretrained(folder: Path, state: dict[str, Tensor], config: GPTConfig) -> None:
    """GPT.save_pretrained from a model's state_dict alone."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    if config.tie_embeddings:
        del state["lm_head.weight"]
    write_model(folder, state, config.to_hf())


def write_model(folder: Path, state: dict[str, Tensor], hf: dict) -> None:
    """The weights first: a folder with a config.json has them."""
    write_tensors(folder / "model.safetensors", state)
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 50,
                  "bos_token_id": hf["bos_token_id"], "eos_token_id": hf["eos_token_id"]}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", hf)


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's GPU, else the CPU. Of several GPUs one: the first. Refuses what is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device: expected auto, cpu, cuda or mps, got {name}")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= here:
        raise UserError(f"--device {name}: this machine has {here or 'none'} of them")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def gpu_has_bf16(device: torch.device) -> bool:
    """Whether this is a CUDA GPU that computes in bfloat16, rather than imitate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class Uninitialised(TorchFunctionMode):
    """Modules made in this context do not fill their weights, which are about to be replaced."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs or {})


def check_tensors(folder: Path, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Every expected tensor there in its shape and dtype, finite, and nothing else; names the first that is off."""
    for name, like in expected.items():
        if name not in got:
            raise UserError(f"{folder}: tensor {name} is missing from model.safetensors")
        if (got[name].shape, got[name].dtype) != (like.shape, like.dtype):
            raise UserError(f"{folder}: tensor {name}: expected {like.dtype} {tuple(like.shape)}, "
                            f"got {got[name].dtype} {tuple(got[name].shape)}")
        if got[name].is_floating_point() and not got[name].sum().isfinite():  # 30 times faster than asking each
            raise UserError(f"{folder}: tensor {name}: expected numbers, got some that are NaN or infinite")
    for name in got:
        if name not in expected:
            raise UserError(f"{folder}: tensor {name} in model.safetensors has no place in this model")


def sample_next(logits: Tensor, seen: Tensor, temperature: float, top_k: int | None, top_p: float | None,
                repetition_penalty: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token a row: logits (B, V) fp32, seen (B, T) the tokens so far -> (B,) int64."""
    if repetition_penalty != 1.0:  # Keskar et al., 2019
        score = logits.gather(1, seen)
        score = torch.where(score > 0, score / repetition_penalty, score * repetition_penalty)
        logits = logits.scatter(1, seen, score)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:  # nucleus (Holtzman et al., 2019): the likeliest always stays
        ordered, order = logits.softmax(dim=-1).sort(descending=True)
        tail = ordered.cumsum(dim=-1) - ordered >= top_p
        logits = logits.masked_fill(tail.scatter(1, order, tail), -math.inf)
    probabilities = logits.softmax(dim=-1)
    # torch.multinomial, draw for draw, without its checks, for which a GPU would have to wait and not be recorded
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)


def generate(model: GPT, idx: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
             eos: int | list[int] | None = None, generator: torch.Generator | None = None,
             use_cache: bool = True) -> Iterator[Tensor]:
    """Continue the prompts idx (B, T) int64; an iterator over (B,) new tokens at a time.

    temperature 0 is greedy. Stops when every row has produced `eos` (or one of several); a row that
    has, repeats it.
    Past block_size the window restarts on the last half of a context. Keys and values are
    recomputed there, so the tokens are the same with and without the cache (an int8 one rounds).
    Raises UserError, before any work, for a prompt or setting out of range.
    """
    T, block = idx.size(1), model.config.block_size
    for name, good, expected, got in (
            ("the prompt", 1 <= T <= block, f"1 to {block} tokens (the model's context)", T),
            ("temperature", 0 <= temperature < math.inf, "0 (greedy) or more", temperature),
            ("top-k", top_k is None or top_k >= 1, "1 or more", top_k),
            ("top-p", top_p is None or 0 < top_p <= 1, "more than 0, at most 1", top_p),
            ("repetition-penalty", repetition_penalty > 0, "more than 0", repetition_penalty)):
        if not good:
            raise UserError(f"{name}: expected {expected}, got {got}")
    draw = partial(sample_next, temperature=temperature, top_k=top_k, top_p=top_p,
                   repetition_penalty=repetition_penalty, generator=generator)
    return _decode(model, idx, max_new_tokens, draw, eos, generator, use_cache)


@torch.inference_mode()
def _decode(model: GPT, idx: Tensor, max_new_tokens: int, draw: Callable[[Tensor, Tensor], Tensor],
            eos: int | list[int] | None, generator: torch.Generator | None, use_cache: bool) -> Iterator[Tensor]:
    (B, T), block = idx.shape, model.config.block_size
    stops = None if eos is None else torch.tensor(eos, device=model.device).view(-1)
    tokens = torch.empty(B, T + max_new_tokens, dtype=torch.long, device=model.device)
    tokens[:, :T] = idx
    done = torch.zeros(B, dtype=torch.bool, device=model.device)

    def choose(logits: Tensor, seen: Tensor) -> Tensor:
        token = draw(logits[:, -1].float(), seen)
        if stops is not None:
            token = torch.where(done, stops[0], token)
            done.logical_or_((token[:, None] == stops).any(dim=1))
        return token

    cache = model.new_cache(B, min(block, T + max_new_tokens)) if use_cache else None
    graph = None
    if cache is not None and cache.recordable:
        from cuda_graph import TokenGraph

        graph = TokenGraph(model, cache, choose, done, generator)
    start = 0  # of the window
    for end in range(T, T + max_new_tokens):
        if end - start > block:
            start = end - max(1, block // 2)
            if cache is not None:
                cache.pos = 0
        if graph is not None and cache.pos:
            token = graph.next()
        else:
            known = start + (cache.pos if cache is not None else 0)
            logits, _ = model(tokens[:, known:end], cache=cache)
            token = choose(logits, tokens[:, start:end])
            if graph is not None:
                graph.begin(tokens[:, start:end], token)
        tokens[:, end] = token
        yield token
        if stops is not None and done.all():
            return
