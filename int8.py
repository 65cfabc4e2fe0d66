"""The int8 model: weights and activations in int8, everything between the products in fp32.

Weights: symmetric int8, one fp32 scale for each output channel. Activations: symmetric int8, one scale for each token,
found as the model runs ("dynamic"). Products are summed exactly in int32.
"""

import copy
import io
import warnings
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

from cli import UserError, note

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import (
    StoredTensors,
    check_tensors,
    config_from_hf,
    config_to_hf,
    empty_model,
    read_config,
    read_tensors,
    write_model,
)
from files import checked
from generate import StaticKVCache
from model import GPT, Block, GPTConfig, KVCache

try:
    import owlet_kernels  # registers torch.ops.owlet
except ImportError as error:
    owlet_kernels = None
    why_no_kernels = f"owlet's int8 kernels are not built ({error}); build them with: python setup.py build_ext"

# ---------------------------------------------------------------- primitives

FORMAT = {  # in config.json, so that nobody takes the folder for another format
    "quant_method": "owlet", "bits": 8, "weights": "symmetric, one scale an output channel",
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
    # not 127 / amax: torch computes that as the reciprocal times 127, which rounds twice
    inverse = torch.where(amax >= 1e-30, torch.full_like(amax, 127) / amax, 0.0)
    q = torch.round(x * inverse).nan_to_num(0.0).clamp(-127, 127).to(torch.int8)
    return q, torch.where(amax.isfinite(), amax / 127, torch.nan)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None,
                          residual: Tensor | None = None, activation: str = "none") -> Tensor:
    """The product that every fast path must equal: x (..., K) fp32, weight (N, K) int8, scale (N,) -> (..., N) fp32.

    activation: none, silu or swiglu. With swiglu, rows 2i and 2i + 1 of the weight are gate and up of output i, and y
    is (..., N / 2). The residual (in y's shape) is added last.
    """
    q, x_scale = quantize_tokens(x)
    total = q.double() @ weight.double().T  # float64 is exact for integers up to 2^53
    y = total.float() * x_scale * scale  # here the int8 sums become floats
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


# ---------------------------------------------------------------- one class a backend

class Int8Linear(nn.Module):
    """y = activation(x W^T) + residual with W in int8.

    weight (N, K) int8 and scale (N,) fp32 from quantize_rows; forward(x, residual): x (..., K) fp32 -> (..., N) fp32.
    """

    def __init__(self, weight: Tensor, scale: Tensor, activation: str = "none") -> None:
        super().__init__()
        self.in_features, self.activation = weight.size(1), activation
        self.register_buffer("scale", scale)


class ReferenceLinear(Int8Linear):
    """In plain PyTorch, on any device."""

    def __init__(self, weight: Tensor, scale: Tensor, activation: str = "none") -> None:
        super().__init__(weight, scale, activation)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return int8_linear_reference(x, self.weight, self.scale, None, residual, self.activation)

    def rows(self, idx: Tensor) -> Tensor:
        """Rows idx (...) of the matrix, in fp32 (..., K): the embedding of a tied head."""
        return self.weight[idx] * self.scale[idx].unsqueeze(-1)


class TorchAOLinear(Int8Linear):
    """By PyTorch's own dynamic quantization, which is deprecated: one scale for all tokens of a call. CPU only."""

    def __init__(self, weight: Tensor, scale: Tensor, activation: str = "none") -> None:
        super().__init__(weight, scale, activation)
        N, K = weight.shape
        with warnings.catch_warnings(action="ignore"):  # of the deprecation
            per_row = torch._make_per_channel_quantized_tensor(weight, scale.double(), torch.zeros(N).long(), 0)
            self.dynamic = torch.ao.nn.quantized.dynamic.Linear(K, N, bias_=False)
            self.dynamic.set_weight_bias(per_row, None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = activate(self.dynamic(x), self.activation)
        return y if residual is None else y + residual


class KernelLinear(Int8Linear):
    """By owlet's kernels (csrc/), where the weight is: on a CPU or a GPU. pack: the weight in the kernels' layout."""

    def __init__(self, weight: Tensor, scale: Tensor, activation: str = "none",
                 pack: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(weight, scale, activation)
        self.register_buffer("weight", (pack or torch.ops.owlet.pack_int8)(weight))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return torch.ops.owlet.int8_linear(x, self.weight, self.scale, None, residual, self.activation)

    def rows(self, idx: Tensor) -> Tensor:
        return torch.ops.owlet.int8_rows(self.weight, self.scale, idx, self.in_features)


class FineLinear(nn.Module):
    """A product whose activations have some 15 bits: x in int8, and what that leaves of x in int8 again."""

    def __init__(self, linear: Int8Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        q, scale = quantize_tokens(x)
        return self.linear(x) + self.linear(x - q * scale)


class SlicedLinear(nn.Module):
    """A product whose channels of x have scales in slices, one for each of the linears; their results add up."""

    def __init__(self, linears: list[Int8Linear]) -> None:
        super().__init__()
        self.slices = nn.ModuleList(linears)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        for linear, part in zip(self.slices, x.chunk(len(self.slices), dim=-1), strict=True):
            residual = linear(part, residual)
        return residual


LINEARS: dict[str, type[Int8Linear]] = {"owlet": KernelLinear, "torch.ao": TorchAOLinear, "reference": ReferenceLinear}


def pick_backend(name: str, device: torch.device) -> str:
    """auto: the fastest that is here. Where the kernels are missing, a note says why, once, and what takes their place.

    Raises UserError where the backend asked for cannot run on this device.
    """
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
    note(f"{why_not}; going on with {fallback}")
    return fallback


def has_torch_ao() -> bool:
    """torch.ao's dynamic quantization is deprecated: a later torch may lack it."""
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
            owlet_kernels.isa(), owlet_kernels.variant()
        except ValueError as error:  # a wrong OWLET_ISA or OWLET_KERNEL
            raise UserError(str(error)) from None
        return None
    if device.type != "cuda" or not has_cuda_kernels():
        return f"owlet's int8 kernels are not built for {device.type}"
    gpu = torch.cuda.get_device_name(device)
    try:  # the kernels may be built for other GPUs, and may never have run on this one
        right = product_is_exact(device)
    except RuntimeError as error:
        return f"owlet's int8 kernels do not run on {gpu} ({str(error).splitlines()[0]})"
    return None if right else f"owlet's int8 kernels compute wrong sums on {gpu}; please report this"


def product_is_exact(device: torch.device) -> bool:
    """Whether a small product of KernelLinear equals the reference on this device."""
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_rows(torch.randn(130, 257, generator=generator))
    x = torch.randn(70, 257, generator=generator)
    linear = KernelLinear(weight.to(device), scale.to(device))
    return all(torch.equal(linear(x[:tokens].to(device)).cpu(), int8_linear_reference(x[:tokens], weight, scale))
               for tokens in (1, 20, 70))


# ---------------------------------------------------------------- the int8 model

class Int8Embedding(nn.Module):
    """Rows of an int8 matrix: of the head's, where the two are tied."""

    def __init__(self, matrix: ReferenceLinear | KernelLinear) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, idx: Tensor) -> Tensor:
        return self.matrix.rows(idx)


class Int8Block(nn.Module):
    """model.Block with four int8 products.

    q, k and v share one product, and so one quantization of x. gate and up share one, which returns silu(gate) * up.
    Both residuals are added in the product before them.
    """

    def __init__(self, block: Block, linear: Callable[..., Int8Linear]) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = block.input_layernorm, block.self_attn
        self.post_attention_layernorm = block.post_attention_layernorm
        self.widths = [getattr(block.self_attn, f"{name}_proj").out_features for name in "qkv"]
        self.qkv_proj = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o_proj = linear("self_attn.o_proj")
        self.gate_up_proj = linear("mlp.gate_proj", "mlp.up_proj", activation="swiglu")
        self.down_proj = linear("mlp.down_proj", sliced=True)
        for name in "qkvo":  # self_attn keeps what lies between the products
            delattr(self.self_attn, f"{name}_proj")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv_proj(self.input_layernorm(x)).split(self.widths, dim=-1)
        x = self.o_proj(self.self_attn.attend(q, k, v, cos, sin, mask, cache), residual=x)
        return self.down_proj(self.gate_up_proj(self.post_attention_layernorm(x)), residual=x)


class Int8KVCache(KVCache):
    """A quarter of the memory: int8 keys and values, one fp32 scale for each token and head.

    key_scales, value_scales: (n_layer, B, n_kv_head, length).
    """

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


def scales(cache: KVCache) -> tuple[Tensor, ...]:
    return (cache.key_scales, cache.value_scales) if isinstance(cache, Int8KVCache) else ()


class Int8GPT(GPT):
    """A GPT of Int8Linear matrices.

    With owlet's kernels it has a decoder in C++, which does a whole call's work with the same arithmetic over the same
    weights: csrc/decoder.cpp on a CPU, csrc/cuda/decoder.cu for a captured token on a GPU.
    int8_cache: keep keys and values in int8 too. Halves the bytes read per token at long contexts.
    """

    decoder, int8_cache, linears = None, False, ""
    guesses = 0, 0  # of the last text: how many there were, and how many were right

    @property
    def backend(self) -> str:
        """What computes the products. On a CPU the first tokens choose how the kernel reads the weights."""
        if self.linears != "owlet":
            return self.linears
        on_cpu = self.device.type == "cpu"
        return f"owlet ({f'{owlet_kernels.isa()}, {owlet_kernels.variant()}' if on_cpu else self.device.type})"

    @property
    def fine_head(self) -> bool:
        return isinstance(self.lm_head, FineLinear)

    @property
    def slices(self) -> int:
        return len(self.model.layers[0].down_proj.slices)

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        kind = Int8KVCache if self.int8_cache else KVCache
        return kind(self.config, batch_size, length, self.device)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        if self.int8_cache and targets is not None:  # the loss of what generating computes
            cache = cache or self.new_cache(*idx.shape)
        if targets is not None or not self.decoder_takes(cache):
            return super().forward(idx, targets, cache)
        self.check_fits(cache.end(idx.size(1)))
        logits = self.decoder.forward(idx, cache.pos, cache.keys, cache.values, *scales(cache))
        cache.pos += idx.size(1)
        return logits, None

    def decoder_takes(self, cache: KVCache | None) -> bool:
        """The CPU's decoder takes every call with a cache of its own, the GPU's only what is captured as a graph."""
        return (self.decoder is not None and cache is not None
                and isinstance(cache, StaticKVCache) == (self.device.type == "cuda"))

    def new_writer(self, prompts: Tensor, new_tokens: int, draft: "Int8GPT | None",
                   settings: dict) -> "owlet_kernels.Writer":
        """csrc/writer.cpp for the prompts (B, T), on a CPU."""
        def with_caches(model: Int8GPT) -> tuple:
            cache = model.new_cache(len(prompts), min(model.config.block_size, prompts.size(1) + new_tokens))
            return model.decoder, (cache.keys, cache.values, *(scales(cache) or (None, None)))

        return owlet_kernels.Writer(prompts=prompts, new_tokens=new_tokens, model=with_caches(self),
                                    draft=with_caches(draft) if draft is not None else None, **settings)

    def make_decoder(self) -> "owlet_kernels.Decoder | owlet_kernels.CudaDecoder":
        config, matrix = self.config, attrgetter("weight", "scale")
        make = owlet_kernels.CudaDecoder if self.device.type == "cuda" else owlet_kernels.Decoder
        return make(
            n_embd=config.n_embd, n_head=config.n_head, n_kv_head=config.n_kv_head, head_dim=config.head_dim,
            n_hidden=config.n_hidden, norm_eps=config.norm_eps, cos=self.cos, sin=self.sin,
            embedding=matrix(self.model.embed_tokens.matrix), norm=self.model.norm.weight,
            head=matrix(self.lm_head.linear if self.fine_head else self.lm_head), fine_head=self.fine_head,
            blocks=[(block.input_layernorm.weight, matrix(block.qkv_proj),
                     block.self_attn.q_norm.weight if config.qk_norm else None,
                     block.self_attn.k_norm.weight if config.qk_norm else None,
                     matrix(block.o_proj), block.post_attention_layernorm.weight,
                     matrix(block.gate_up_proj), list(map(matrix, block.down_proj.slices)))
                    for block in self.model.layers])

    @torch.inference_mode()
    def decoder_agrees(self) -> bool:
        """Whether the decoder gives one token the logits that PyTorch gives it over the same weights."""
        token, caches = torch.zeros(1, 1, dtype=torch.long, device=self.device), [self.new_cache(1, 1) for _ in "12"]
        ours = self(token, cache=StaticKVCache(caches[0]) if self.device.type == "cuda" else caches[0])[0]
        theirs = GPT.forward(self, token, cache=caches[1])[0]
        return ((ours - theirs).norm() <= 0.05 * theirs.norm()).item()  # docs/log.md, "First use on a GPU"


# ---------------------------------------------------------------- quantizing, building

def quantize_state(model: GPT, slices: int = 1) -> dict[str, Tensor]:
    """The int8 folder's tensors: X.weight int8 and X.weight_scale; norms stay fp32; a tied head is left out.

    slices: of the columns of down_proj, each with a scale for each row: (N, slices).
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        tensor = tensor.detach().cpu()
        if tensor.dim() == 2:
            parts = slices if name.endswith("down_proj.weight") else 1
            q, scale = quantize_rows(tensor.reshape(len(tensor) * parts, -1))
            state[name], state[f"{name}_scale"] = q.view_as(tensor), scale.view(-1, parts) if parts > 1 else scale
        else:
            state[name] = tensor.float()
    return state


def build(config: GPTConfig, state: dict[str, Tensor] | StoredTensors, backend: str, device: torch.device,
          fine_head: bool = False) -> Int8GPT:
    """The int8 model from quantize_state's tensors, on the device. fine_head: the head is a FineLinear."""
    make = LINEARS[backend]
    slices = state["model.layers.0.mlp.down_proj.weight_scale"].view(config.n_embd, -1).size(1)
    if backend == "owlet" and device.type == "cpu":
        make = partial(KernelLinear, pack=owlet_kernels.Panels(matrix_shapes(config, slices)).pack)

    def linear(prefix: str, *names: str, activation: str = "none", sliced: bool = False) -> Int8Linear | SlicedLinear:
        weights = [state[f"{prefix}{name}.weight"] for name in names]
        scales = [state[f"{prefix}{name}.weight_scale"] for name in names]
        if activation == "swiglu":  # row 2i: gate i, row 2i + 1: up i
            weight, scale = (torch.stack(parts, dim=1).flatten(0, 1) for parts in (weights, scales))
        else:
            weight, scale = torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(scales)
        if sliced:
            parts = zip(weight.chunk(slices, dim=1), scale.view(len(weight), -1).unbind(dim=1), strict=True)
            return SlicedLinear([make(w.contiguous().to(device), s.contiguous().to(device)) for w, s in parts])
        return make(weight.to(device), scale.to(device), activation)

    model = empty_model(config, Int8GPT)
    # What is kept is a copy (of scales by torch.cat): a tensor read from a file keeps the whole file in memory.
    norms = {name: state[name].clone() for name, like in model.state_dict().items() if like.dim() == 1}
    model.load_state_dict(norms, strict=False, assign=True)
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = Int8Block(block, partial(linear, f"model.layers.{i}."))
    embedding = "model.embed_tokens"
    model.lm_head = linear("", embedding if config.tie_embeddings else "lm_head")
    table = ReferenceLinear if backend == "torch.ao" else make  # torch.ao's layout has no rows to read
    model.model["embed_tokens"] = Int8Embedding(
        model.lm_head if config.tie_embeddings and table is make else
        table(state[f"{embedding}.weight"].to(device), state[f"{embedding}.weight_scale"].clone().to(device)))
    if fine_head:
        model.lm_head = FineLinear(model.lm_head)
    model = model.eval().requires_grad_(False).to(device)
    model.linears = backend
    if backend == "owlet":
        add_decoder(model)
    return model


def matrix_shapes(config: GPTConfig, slices: int = 1) -> list[tuple[int, int]]:
    """(N, K) of the model's matrices in the order of use."""
    C, width, H = config.n_embd, config.n_head * config.head_dim, config.n_hidden
    block = [(width + 2 * config.n_kv_head * config.head_dim, C), (C, width), (2 * H, C), *[(C, H // slices)] * slices]
    return block * config.n_layer + [(config.vocab_size, C)] * (1 if config.tie_embeddings else 2)


def add_decoder(model: Int8GPT) -> None:
    """On a GPU, where it may never have run, the decoder must agree with PyTorch: wrong text is worse than slow."""
    head_dim = model.config.head_dim
    if model.device.type == "cpu":
        model.decoder = model.make_decoder()
    elif (parts := model.fine_head or model.slices > 1) or head_dim % 16 or head_dim > 128:
        what = "no products in parts" if parts else f"heads of 16, 32, ... 128, not of {head_dim}"
        note(f"csrc/cuda/decoder.cu takes {what}; going on with PyTorch's attention")
    else:
        model.decoder = model.make_decoder()
        if not model.decoder_agrees():
            note("the decoder of csrc/cuda differs from PyTorch on this GPU (please report this); going on without it")
            model.decoder = None


def quantize(model: GPT, backend: str = "auto") -> Int8GPT:
    """The int8 copy of an fp32 model, on the CPU."""
    cpu = torch.device("cpu")
    return build(model.config, quantize_state(model), pick_backend(backend, cpu), cpu)


def torch_ao(model: GPT) -> GPT:
    """PyTorch's own dynamic int8 of an fp32 model, to compare with: linear layers only, the embedding stays fp32."""
    with warnings.catch_warnings(action="ignore"):  # of the deprecation
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def stored_size(model: GPT) -> int:
    """Bytes of the file that torch.save makes of the weights."""
    torch.save(model.state_dict(), buffer := io.BytesIO())
    return buffer.tell()


# ---------------------------------------------------------------- the int8 folder

def save_quantized(model: GPT, folder: Path, fine_head: bool = False, slices: int = 1) -> None:
    """Write an fp32 model's int8 folder: row-major int8, which every machine packs for itself."""
    form = FORMAT | ({"fine": ["lm_head"]} if fine_head else {}) | ({"down_proj_slices": slices} if slices > 1 else {})
    write_model(folder, quantize_state(model, slices), config_to_hf(model.config) | {"quantization_config": form})


def load_quantized(folder: Path, backend: str = "auto", device: torch.device | str = "cpu",
                   int8_cache: bool = False) -> Int8GPT:
    """Load an int8 folder written by save_quantized."""
    folder, device = Path(folder), torch.device(device)
    hf = read_config(folder)
    where = f"{folder}/config.json: quantization_config"
    found = checked(hf.get("quantization_config"), dict, where)
    fine, slices = found.pop("fine", []), checked(found.pop("down_proj_slices", 1), int, f"{where}: down_proj_slices")
    config = config_from_hf(hf, folder / "config.json")
    if found != FORMAT or fine not in ([], ["lm_head"]) or slices not in range(1, 65) or config.n_hidden % slices:
        raise UserError(f"{where}: expected {FORMAT}, got {found} with fine = {fine} and down_proj_slices = {slices}")
    expected = empty_model(config).state_dict()
    if config.tie_embeddings:
        del expected["lm_head.weight"]
    for name, tensor in list(expected.items()):
        if tensor.dim() == 2:
            expected[name] = torch.empty(tensor.shape, dtype=torch.int8, device="meta")
            shape = (len(tensor), slices) if slices > 1 and name.endswith("down_proj.weight") else (len(tensor),)
            expected[f"{name}_scale"] = torch.empty(shape, device="meta")
    check_tensors(folder / "model.safetensors", expected, read_tensors(folder))
    model = build(config, StoredTensors(folder), pick_backend(backend, device), device, fine_head=bool(fine))
    model.int8_cache = int8_cache
    return model
