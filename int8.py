"""The int8 model: weights and activations in int8, everything between the products in fp32.

Weights: symmetric int8, one fp32 scale for each output channel. Activations: symmetric int8, one
scale for each token, found as the model runs ("dynamic"). Products are summed exactly in int32.
"""

import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import read_config, read_tensors
from cli import UserError
from model import GPT, Block, GPTConfig, KVCache, StaticKVCache, Uninitialised, check_tensors, write_model

try:
    import owlet_kernels  # registers torch.ops.owlet
except ImportError as error:
    owlet_kernels = None
    why_no_kernels = f"owlet's int8 kernels are not built ({error}); build them with: python setup.py build_ext"

Backend = Literal["owlet", "torch.ao", "reference"]

# ---------------------------------------------------------------- primitives

FORMAT = {"quant_method": "owlet", "bits": 8, "weights": "symmetric, one scale an output channel",
          "activations": "symmetric, dynamic, one scale a token"}


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K) float -> int8 (N, K) in -127..127 and fp32 scales (N,), so that w ~ q * scale."""
    scale = w.float().abs().amax(dim=1) / 127
    q = torch.round(w.float() / torch.where(scale > 0, scale, 1.0)[:, None])  # a row of zeros has scale 0
    return q.clamp(-127, 127).to(torch.int8), scale


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) fp32 -> int8 (..., K) and one fp32 scale a token (..., 1).

    A token with NaN or infinity gets a scale that is not finite, so that its results are NaN.
    """
    amax = x.abs().amax(dim=-1, keepdim=True)
    # not 127 / amax, which torch takes for amax's reciprocal times 127: rounded twice
    inverse = torch.where(amax >= 1e-30, torch.full_like(amax, 127) / amax, 0.0)
    q = torch.round(x * inverse).nan_to_num(0.0).clamp(-127, 127).to(torch.int8)
    return q, torch.where(amax.isfinite(), amax / 127, torch.nan)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None,
                          residual: Tensor | None = None, activation: str = "none") -> Tensor:
    """What every fast path must equal: x (..., K) fp32, weight (N, K) int8, scale (N,) -> (..., N).

    activation: none, silu, or swiglu: rows 2i and 2i + 1 of the weight are gate and up of output i,
    so that y is (..., N / 2). The residual (shaped like y) is added last.
    """
    q, x_scale = quantize_tokens(x)
    total = q.double() @ weight.double().T  # float64 holds integers to 2^53: exact, and fast
    y = total.float() * x_scale * scale
    if bias is not None:
        y = y + bias
    y = activate(y, activation)
    return y if residual is None else y + residual


def activate(y: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(y)
    if activation == "swiglu":
        return F.silu(y[..., 0::2]) * y[..., 1::2]
    return y


# ---------------------------------------------------------------- the int8 model

def has_torch_ao() -> bool:
    """torch.ao's dynamic quantization is deprecated: it may be gone from a later torch."""
    return hasattr(torch, "ao") and hasattr(torch.ao.quantization, "quantize_dynamic")


def has_cuda_kernels() -> bool:
    """setup.py adds them where torch is a CUDA build and nvcc is found."""
    return hasattr(owlet_kernels, "CudaDecoder")


def why_no_owlet(device: torch.device) -> str | None:
    """Why owlet's kernels cannot run on this device; None: they can."""
    if owlet_kernels is None:
        return why_no_kernels
    if device.type == "cpu":
        try:
            owlet_kernels.isa()
        except ValueError as error:  # a wrong OWLET_ISA
            raise UserError(str(error)) from None
        return None
    if device.type != "cuda" or not has_cuda_kernels():
        return f"owlet's int8 kernels are not built for {device.type}"
    try:  # they may be built for other GPUs
        one = torch.ones(1, 1, device=device)
        torch.ops.owlet.int8_linear(one, pack_tiles(one.to(torch.int8)), one[0])
    except RuntimeError as error:
        return f"owlet's int8 kernels do not run on {torch.cuda.get_device_name(device)} ({str(error).splitlines()[0]})"
    return None


def pick_backend(name: str, device: torch.device) -> Backend:
    """auto: the fastest that is here. A missing extension is said, with the cure."""
    if name == "torch.ao" and not (has_torch_ao() and device.type == "cpu"):
        raise UserError("--backend torch.ao: needs a CPU and a torch that still has torch.ao.quantization")
    if name in ("torch.ao", "reference"):
        return name
    why_not = why_no_owlet(device)
    if not why_not:
        return "owlet"
    if name == "owlet":
        raise UserError(f"--backend owlet: {why_not}")
    fallback = "torch.ao" if has_torch_ao() and device.type == "cpu" else "reference"
    print(f"note: {why_not}; going on with {fallback}", file=sys.stderr)
    return fallback


def pack_tiles(weight: Tensor) -> Tensor:
    """For the CUDA kernels: (N, K) int8 -> (ceil(N / 8), ceil(K / 64), 8, 64), zero past N and K."""
    N, K = weight.shape
    padded = F.pad(weight, (0, -K % 64, 0, -N % 8))
    return padded.unflatten(1, (-1, 64)).unflatten(0, (-1, 8)).transpose(1, 2).contiguous()


class Int8Linear(nn.Module):
    """y = activation(x W^T) + residual with W in int8, by one of three backends.

    weight (N, K) int8 and scale (N,) fp32 from quantize_rows; x (..., K) fp32 -> (..., N) fp32.
    """

    def __init__(self, weight: Tensor, scale: Tensor, backend: Backend, activation: str = "none",
                 memory: "PackedMemory | None" = None, tiles: bool = False) -> None:
        """memory: to pack the weight into; tiles: pack it for CUDA, where the module is to be moved."""
        super().__init__()
        self.backend, self.activation, self.in_features, self.tiles = backend, activation, weight.size(1), tiles
        self.register_buffer("scale", scale)
        if tiles:
            weight = pack_tiles(weight)
        elif backend == "owlet":
            weight = memory.pack(weight) if memory else torch.ops.owlet.pack_int8(weight)
        self.register_buffer("weight", weight)
        if backend == "torch.ao":
            N, K = weight.shape
            with warnings.catch_warnings(action="ignore"):  # deprecated, as said above
                per_row = torch._make_per_channel_quantized_tensor(weight, scale.double(), torch.zeros(N).long(), 0)
                self.dynamic = torch.ao.nn.quantized.dynamic.Linear(K, N, bias_=False)
                self.dynamic.set_weight_bias(per_row, None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.backend == "owlet":
            return torch.ops.owlet.int8_linear(x, self.weight, self.scale, None, residual, self.activation)
        if self.backend == "reference":
            return int8_linear_reference(x, self.weight, self.scale, None, residual, self.activation)
        y = activate(self.dynamic(x), self.activation)
        return y if residual is None else y + residual

    def rows(self, idx: Tensor) -> Tensor:
        """Rows idx (...) of the matrix, in fp32 (..., K): the embedding of a tied head."""
        if self.tiles:
            row = self.weight[idx // 8, :, idx % 8].flatten(-2)[..., :self.in_features]
        elif self.backend == "owlet":  # packed (N / 64, K / 4, 64, 4), each value + 128
            row = self.weight[idx // 64, :, idx % 64].flatten(-2)[..., :self.in_features].to(torch.int16) - 128
        else:
            row = self.weight[idx]
        return row * self.scale[idx].unsqueeze(-1)


class PackedMemory:
    """One block for all matrices of a model, in the order of use: the processor reads ahead from one into
    the next, and large pages save it from looking up addresses.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.rest = owlet_kernels.huge_pages(sum(math.prod(self.shape(weight)) for weight in weights))

    @staticmethod
    def shape(weight: Tensor) -> tuple[int, ...]:
        N, K = weight.shape
        return math.ceil(N / 64), math.ceil(K / 4), 64, 4

    def pack(self, weight: Tensor) -> Tensor:
        shape = self.shape(weight)
        packed, self.rest = self.rest.tensor_split([math.prod(shape)])
        packed = packed.view(shape)
        owlet_kernels.pack_into(weight, packed)
        return packed


class Int8Embedding(nn.Module):
    """Rows of an int8 matrix; of the head's own, where the two are tied."""

    def __init__(self, matrix: Int8Linear) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, idx: Tensor) -> Tensor:
        return self.matrix.rows(idx)


class Int8Block(nn.Module):
    """model.Block with four int8 products. q, k and v share one product, and so one quantization
    of x; gate and up share one that hands on silu(gate) * up; both residuals are added in passing.
    """

    def __init__(self, block: Block, linear: Callable[..., Int8Linear]) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = block.input_layernorm, block.self_attn
        self.post_attention_layernorm = block.post_attention_layernorm
        self.widths = [getattr(block.self_attn, f"{name}_proj").out_features for name in "qkv"]
        self.qkv_proj = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o_proj = linear("self_attn.o_proj")
        self.gate_up_proj = linear("mlp.gate_proj", "mlp.up_proj", activation="swiglu")
        self.down_proj = linear("mlp.down_proj")
        for name in "qkvo":  # self_attn keeps what lies between the products
            delattr(self.self_attn, f"{name}_proj")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv_proj(self.input_layernorm(x)).split(self.widths, dim=-1)
        x = self.o_proj(self.self_attn.attend(q, k, v, cos, sin, mask, cache), residual=x)
        return self.down_proj(self.gate_up_proj(self.post_attention_layernorm(x)), residual=x)


def huge_empty(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU, in memory that is quick to read through."""
    return owlet_kernels.huge_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


class Int8KVCache(KVCache):
    """A quarter of the memory: int8 keys and values, one fp32 scale for each token and head.

    key_scales, value_scales: (n_layer, B, n_kv_head, length).
    """

    recordable = False  # StaticKVCache has no scales

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs | {"dtype": torch.int8})
        self.key_scales, self.value_scales = (
            torch.empty(self.keys.shape[:-1], device=self.keys.device) for _ in range(2))

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Round and append; return all keys and values so far, in fp32."""
        here, end, so_far = self.positions(k.size(2)), self.end(k.size(2)), []
        for q, scale, new in ((self.keys, self.key_scales, k), (self.values, self.value_scales, v)):
            q[layer, :, :, here], new_scale = quantize_tokens(new)
            scale[layer, :, :, here] = new_scale.squeeze(-1)
            so_far.append(q[layer, :, :, :end] * scale[layer, :, :, :end, None])
        return tuple(so_far)


class Int8GPT(GPT):
    """A GPT of Int8Linear matrices. On a CPU with the kernels, whatever comes with a cache goes through
    the C++ decoder (csrc/decoder.cpp): the same arithmetic over the same weights, in one call. On a GPU with
    the kernels, a token that is recorded goes through another (csrc/cuda/decoder.cu).

    int8_cache: keep keys and values in int8 too; for long contexts, which they would fill the memory's
    bandwidth with.
    """

    decoder, int8_cache = None, False

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        kind = Int8KVCache if self.int8_cache else KVCache
        empty = huge_empty if self.decoder and self.device.type == "cpu" else torch.empty
        return kind(self.config, batch_size, length, self.device, empty=empty)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        if self.int8_cache and targets is not None:  # the loss is to be that of generating
            cache = cache or self.new_cache(*idx.shape)
        recorded = isinstance(cache, StaticKVCache)
        if self.decoder is None or cache is None or targets is not None or recorded != (self.device.type == "cuda"):
            return super().forward(idx, targets, cache)
        self.check_fits(cache.end(idx.size(1)))
        scales = (cache.key_scales, cache.value_scales) if isinstance(cache, Int8KVCache) else ()
        logits = self.decoder.forward(idx, cache.pos, cache.keys, cache.values, *scales)
        cache.pos += idx.size(1)
        return logits, None

    def make_decoder(self) -> "owlet_kernels.Decoder | owlet_kernels.CudaDecoder":
        config, layers = self.config, self.model.layers

        def matrix(linear: Int8Linear) -> tuple[Tensor, Tensor]:
            return linear.weight, linear.scale

        make = owlet_kernels.CudaDecoder if self.device.type == "cuda" else owlet_kernels.Decoder
        return make(
            n_embd=config.n_embd, n_head=config.n_head, n_kv_head=config.n_kv_head, head_dim=config.head_dim,
            n_hidden=config.n_hidden, norm_eps=config.norm_eps, cos=self.cos, sin=self.sin,
            embedding=matrix(self.model.embed_tokens.matrix), norm=self.model.norm.weight, head=matrix(self.lm_head),
            blocks=[(block.input_layernorm.weight, matrix(block.qkv_proj),
                     block.self_attn.q_norm.weight if config.qk_norm else None,
                     block.self_attn.k_norm.weight if config.qk_norm else None,
                     matrix(block.o_proj), block.post_attention_layernorm.weight,
                     matrix(block.gate_up_proj), matrix(block.down_proj)) for block in layers])


def quantize_state(model: GPT) -> dict[str, Tensor]:
    """The int8 folder's tensors: X.weight int8 and X.weight_scale; norms stay fp32; a tied head is left out."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        tensor = tensor.detach().cpu()
        if tensor.dim() == 2:
            state[name], state[f"{name}_scale"] = quantize_rows(tensor)
        else:
            state[name] = tensor.float()
    return state


def build(config: GPTConfig, state: dict[str, Tensor], backend: Backend, device: torch.device) -> Int8GPT:
    """The int8 model from quantize_state's tensors, on the device."""

    memory, tiles = None, backend == "owlet" and device.type == "cuda"
    if backend == "owlet" and not tiles:  # split or joined, no matrix takes more
        memory = PackedMemory([tensor for tensor in state.values() if tensor.dtype == torch.int8])

    def linear(prefix: str, *names: str, activation: str = "none") -> Int8Linear:
        weights = [state[f"{prefix}{name}.weight"] for name in names]
        scales = [state[f"{prefix}{name}.weight_scale"] for name in names]
        if activation == "swiglu":  # row 2i: gate i, row 2i + 1: up i
            weight, scale = (torch.stack(parts, dim=1).flatten(0, 1) for parts in (weights, scales))
        else:
            weight, scale = torch.cat(weights), torch.cat(scales)
        return Int8Linear(weight, scale, backend, activation, memory, tiles)

    with Uninitialised():
        model = Int8GPT(config)
    # cloned: a tensor read from a file keeps the whole file in memory
    norms = {name: state[name].clone() for name, like in model.state_dict().items() if like.dim() == 1}
    model.load_state_dict(norms, strict=False, assign=True)
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = Int8Block(block, partial(linear, f"model.layers.{i}."))
    embedding = "model.embed_tokens"
    model.lm_head = linear("", embedding if config.tie_embeddings else "lm_head")
    table = model.lm_head if config.tie_embeddings else Int8Linear(
        state[f"{embedding}.weight"], state[f"{embedding}.weight_scale"],
        backend if backend == "owlet" else "reference", memory=memory, tiles=tiles)
    model.model["embed_tokens"] = Int8Embedding(table)
    model.backend = f"{backend} ({'cuda' if tiles else owlet_kernels.isa()})" if backend == "owlet" else backend
    model = model.eval().requires_grad_(False).to(device)
    if tiles and (config.head_dim % 16 or config.head_dim > 128):
        print(f"note: csrc/cuda/decoder.cu takes heads of 16, 32, ... 128, not of {config.head_dim}; "
              "going on with PyTorch's attention", file=sys.stderr)
    elif backend == "owlet":
        model.decoder = model.make_decoder()
    return model


def quantize(model: GPT, backend: str = "auto") -> Int8GPT:
    """The int8 copy of an fp32 model, on the CPU."""
    cpu = torch.device("cpu")
    return build(model.config, quantize_state(model), pick_backend(backend, cpu), cpu)


def save_quantized(model: GPT, folder: Path) -> None:
    """Write an fp32 model's int8 folder: row-major int8, as every machine can pack it for itself."""
    write_model(folder, quantize_state(model), model.config.to_hf() | {"quantization_config": FORMAT})


def from_pretrained(folder: Path, backend: str = "auto", device: torch.device | str = "cpu") -> Int8GPT:
    """Load an int8 folder written by save_quantized."""
    hf = read_config(folder)
    found = hf.get("quantization_config")
    if found != FORMAT:
        raise UserError(f"{folder}/config.json: expected quantization_config {FORMAT}, got {found}")
    config, state = GPTConfig.from_hf(hf), read_tensors(folder)
    with Uninitialised():
        expected = GPT(config).state_dict()
    if config.tie_embeddings:
        del expected["lm_head.weight"]
    for name, tensor in list(expected.items()):
        if tensor.dim() == 2:
            expected[name], expected[f"{name}_scale"] = torch.empty_like(tensor, dtype=torch.int8), tensor[:, 0]
    check_tensors(folder, expected, state)
    device = torch.device(device)
    return build(config, state, pick_backend(backend, device), device)
