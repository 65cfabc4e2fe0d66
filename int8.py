"""The int8 model: weights, activations, keys and values in int8, everything between the products in fp32.

Weights: symmetric int8, one fp32 scale for each output channel. Activations: symmetric int8, one scale for each token,
found as the model runs ("dynamic"). Products are summed exactly in int32.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generate import StaticKVCache
from lib.checkpoint import check_tensors, config_from_hf, empty_model, read_config, read_tensors, write_model
from lib.cli import UserError, note
from lib.files import checked
from model import GPT, GPTConfig, KVCache, apply_rope, rope_table

try:
    import owlet_kernels  # registers torch.ops.owlet
except ImportError as error:
    owlet_kernels, why_no_kernels = None, f"owlet's int8 kernels are not built ({error}): python setup.py build_ext"

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


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None = None,
                          swiglu: bool = False) -> Tensor:
    """The product that every fast path must equal: x (..., K) fp32, weight (N, K) int8, scale (N,) -> (..., N) fp32.

    With swiglu, rows 2i and 2i + 1 of the weight are gate and up of output i, and y is (..., N / 2). The residual (in
    y's shape) is added last.
    """
    q, x_scale = quantize_tokens(x)
    total = q.double() @ weight.double().T  # float64 is exact for integers up to 2^53
    y = total.float() * x_scale * scale  # here the int8 sums become floats
    if swiglu:
        y = F.silu(y[..., 0::2]) * y[..., 1::2]
    return y if residual is None else y + residual


def int8_attention_reference(q: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor,
                             mask: Tensor) -> Tensor:
    """Attention over an int8 cache, as `attend` of csrc/decoder.cpp: q (B, n_head, T, hd) fp32; k, v (B, n_kv_head, S,
    hd) int8 with scales (B, n_kv_head, S, 1); mask (T, S) bool -> (B, n_head, T, hd) fp32.

    Queries are rounded to int8, and so are the softmax's weights, with one scale for each 64 positions.
    """
    k, k_scale, v, v_scale = (t[:, :, None] for t in (k.float(), k_scale, v.float(), v_scale))
    q, q_scale = quantize_tokens(q.unflatten(1, (k.size(1), -1)))  # (B, n_kv_head, group, T, hd)
    scores = (q.float() @ k.mT) * (q_scale / math.sqrt(q.size(-1))) * k_scale.mT  # fp32 is exact up to 2^24
    scores = scores.masked_fill(~mask, -math.inf)  # (B, n_kv_head, group, T, S)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    inverse, rest = 1 / weights.sum(dim=-1, keepdim=True), -mask.size(-1) % 64
    weights = torch.where(mask, weights * v_scale.mT, 0.0)  # what cannot be seen may be NaN
    w, w_scale = quantize_tokens(F.pad(weights, (0, rest)).unflatten(-1, (-1, 64)).transpose(-2, -3))
    sums = w.float() @ F.pad(v, (0, 0, 0, rest)).unflatten(-2, (-1, 64))  # (B, n_kv_head, group, S / 64, T, hd)
    return (sums * (w_scale * inverse[..., None, :, :])).sum(dim=-3).flatten(1, 2)


class Int8KVCache(KVCache):
    """Keys and values in int8, with scales (n_layer, B, n_kv_head, length, 1) fp32."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs | {"dtype": torch.int8})
        self.key_scales, self.value_scales = (
            torch.empty((*self.keys.shape[:-1], 1), device=self.keys.device) for _ in range(2))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        here, end, (T, step) = self.positions(k.size(2)), self.end(k.size(2)), (k.size(2), 256)
        for memory, scales, new in ((self.keys, self.key_scales, k), (self.values, self.value_scales, v)):
            memory[layer, :, :, here], scales[layer, :, :, here] = quantize_tokens(new)
        so_far = [t[layer, :, :, :end] for t in (self.keys, self.key_scales, self.values, self.value_scales)]
        mask = torch.ones(T, end, dtype=torch.bool, device=q.device).tril(end - T) if mask is None else mask
        parts = zip(q.split(step, dim=2), mask.split(step), strict=True)  # T * end weights may not fit the memory
        return torch.cat([int8_attention_reference(q, *so_far, mask) for q, mask in parts], dim=2)


# ---------------------------------------------------------------- backends

def pick_backend(name: str, device: torch.device) -> str:
    """auto: the fastest that is here; a note says why the kernels are not. UserError: what is asked for cannot run."""
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


def has_torch_ao() -> bool:  # it is deprecated
    return hasattr(torch, "ao") and hasattr(torch.ao.quantization, "quantize_dynamic")


def why_no_owlet(device: torch.device) -> str | None:
    """None: they can run on this device."""
    if owlet_kernels is None:
        return why_no_kernels
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not hasattr(owlet_kernels, "CudaDecoder"):
        return f"owlet's int8 kernels are not built for {device.type}"
    gpu = torch.cuda.get_device_name(device)
    try:  # the kernels may be built for other GPUs, and may never have run on this one
        right = product_is_exact(device)
    except RuntimeError as error:
        return f"owlet's int8 kernels do not run on {gpu} ({str(error).splitlines()[0]})"
    return None if right else f"owlet's int8 kernels compute wrong sums on {gpu}; please report this"


def product_is_exact(device: torch.device) -> bool:
    """Whether a small product by the kernels equals the reference on this GPU."""
    w, x = torch.randn(130, 257, generator=torch.Generator().manual_seed(0)).split((60, 70))
    weight, scale = quantize_rows(w)
    return all(torch.equal(torch.ops.owlet.int8_linear(x[:T].to(device), tiles(weight).to(device), scale.to(device)),
                           int8_linear_reference(x[:T], weight, scale).to(device)) for T in (1, 20, 70))


def tiles(w: Tensor) -> Tensor:
    """int8 (N, K) -> (ceil(N / 8), ceil(K / 64), 8, 64), the layout of csrc/cuda, padded with zeros."""
    padded = F.pad(w, (0, -w.size(1) % 64, 0, -w.size(0) % 8))
    return padded.view(-1, 8, padded.size(1) // 64, 64).transpose(1, 2).contiguous()


def torch_ao(model: GPT) -> GPT:
    """PyTorch's dynamic int8 of an fp32 model: one scale for all tokens of a call, the embedding stays fp32."""
    with warnings.catch_warnings(action="ignore"):  # torch.ao is deprecated
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


# ---------------------------------------------------------------- the model as a flat list

def arrays(config: GPTConfig, state: Mapping[str, Tensor], slices: int,
           fine_head: bool) -> Iterator[Tensor]:
    """The arrays of the int8 model in the order of use, from quantize_state's tensors.

    csrc/layout.h (for CPU, GPU and page) and Int8GPT read them in this order. Int8 matrices (N, K), each followed by
    its scales (N,): q, k and v are one; gate and up are one, with their rows in turn.
    """
    c = config
    yield torch.tensor([c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.n_hidden, c.vocab_size, c.block_size, c.n_layer,
                        c.qk_norm, slices, fine_head, c.tie_embeddings])
    yield torch.tensor([float(c.norm_eps)])
    yield from rope_table(c)
    for i in range(c.n_layer):
        def matrix(*names: str, layer: str = f"model.layers.{i}.") -> tuple[list[Tensor], list[Tensor]]:
            return tuple([state[f"{layer}{name}.weight{of}"] for name in names] for of in ("", "_scale"))

        yield state[f"model.layers.{i}.input_layernorm.weight"]
        yield from map(torch.cat, matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        if c.qk_norm:
            yield from (state[f"model.layers.{i}.self_attn.{name}_norm.weight"] for name in "qk")
        yield from map(torch.cat, matrix("self_attn.o_proj"))
        yield state[f"model.layers.{i}.post_attention_layernorm.weight"]
        yield from (torch.stack(both, dim=1).flatten(0, 1) for both in matrix("mlp.gate_proj", "mlp.up_proj"))
        [weight], [scale] = matrix("mlp.down_proj")
        for part in zip(weight.chunk(slices, dim=1), scale.view(len(weight), slices).unbind(dim=1), strict=True):
            yield from (tensor.contiguous() for tensor in part)
    yield state["model.norm.weight"]
    for name in ("model.embed_tokens",) if c.tie_embeddings else ("lm_head", "model.embed_tokens"):
        yield from (state[f"{name}.weight"], state[f"{name}.weight_scale"])


# ---------------------------------------------------------------- the model

class Int8GPT(nn.Module):
    """The int8 model in PyTorch, straight through its flat list; to callers it is like a GPT.

    Matrices are row-major, for the reference, or in tiles, for csrc/cuda, whose decoder takes a captured token.
    """

    new_writer = decoder = None

    def __init__(self, config: GPTConfig, flat: list[Tensor], backend: str) -> None:
        super().__init__()
        sizes, eps, self.cos, self.sin, *self.flat = flat
        self.config, self.backend, self.device, self.eps = config, backend, self.cos.device, eps.item()
        self.slices, self.fine_head = sizes[9:11].tolist()  # the order of Sizes in csrc/layout.h

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        return Int8KVCache(self.config, batch_size, length, self.device)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """As GPT.forward. Keys and values are rounded, also where none are kept."""
        (B, T), c, every = idx.shape, self.config, cache is None or targets is not None
        c.check_fits(T if cache is None else cache.end(T))
        if self.decoder is not None and isinstance(cache, StaticKVCache):
            memory = cache.keys, cache.values, cache.key_scales, cache.value_scales
            logits = self.decoder.forward(idx, cache.pos, *memory)
            cache.pos += T
            return logits, None
        cache = self.new_cache(B, T) if cache is None else cache
        mask, cos, sin = cache.mask(T), self.cos[cache.positions(T)], self.sin[cache.positions(T)]
        weight, scale = self.flat[-2:]  # the embedding's, which are the head's too where they are tied
        q = weight[idx] if weight.dim() == 2 else weight[idx // 8, :, idx % 8].flatten(-2)[..., :c.n_embd]
        x, take = q * scale[idx].unsqueeze(-1), iter(self.flat)  # (B, T, C)

        def rms_norm(x: Tensor) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], next(take), self.eps)

        def linear(x: Tensor, residual: Tensor | None = None, swiglu: bool = False) -> Tensor:
            weight, scale = next(take), next(take)
            product = int8_linear_reference if weight.dim() == 2 else torch.ops.owlet.int8_linear
            return product(x, weight, scale, residual, swiglu)

        for layer in range(c.n_layer):
            qkv = linear(rms_norm(x)).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)  # (B, heads, T, hd)
            q, k, v = qkv.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=1)
            if c.qk_norm:
                q, k = rms_norm(q), rms_norm(k)
            y = cache.attend(layer, apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, mask)
            x = linear(y.transpose(1, 2).flatten(2), x)
            hidden = linear(rms_norm(x), swiglu=True)
            for part in hidden.chunk(self.slices, dim=-1):
                x = linear(part, x)
        cache.pos += T
        x = rms_norm(x if every else x[:, -1:])
        take = iter([next(take), next(take)] * 2)
        logits = linear(x)
        if self.fine_head:  # x's rounding error goes through the head too: about 15 bits in all
            q, scale = quantize_tokens(x)
            logits = logits + linear(x - q * scale)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    def add_decoder(self, flat: list[Tensor]) -> None:
        """csrc/cuda's. It may never have run on this GPU, so it must agree with PyTorch."""
        try:
            self.decoder = owlet_kernels.CudaDecoder(flat)
        except RuntimeError as error:  # a shape that it does not take
            return note(f"csrc/cuda: {str(error).splitlines()[0]}; going on with PyTorch's attention")
        token, cache = torch.zeros(1, 1, dtype=torch.long, device=self.device), self.new_cache(1, 1)
        ours, theirs = (self(token, cache=each)[0] for each in (StaticKVCache(cache), cache))
        if not (ours - theirs).norm() <= 0.05 * theirs.norm():  # docs/log.md, "First use on a GPU"
            note("the decoder of csrc/cuda differs from PyTorch on this GPU (please report this); going on without it")
            self.decoder = None


class KernelGPT(nn.Module):
    """The int8 model in csrc/decoder.cpp and csrc/writer.cpp, on a CPU; to callers it is like a GPT."""

    device, guesses = torch.device("cpu"), (0, 0)  # guesses checked in the last text, and those that were right

    def __init__(self, config: GPTConfig, flat: Iterator[Tensor]) -> None:
        super().__init__()
        self.config = config
        try:
            self.decoder = owlet_kernels.Decoder(flat)
        except (RuntimeError, ValueError) as error:  # sizes that it does not take, an unknown OWLET_ISA
            raise UserError(f"owlet's int8 kernels: {str(error).splitlines()[0]}") from None

    @property
    def backend(self) -> str:
        return f"owlet ({self.decoder.kernel})"

    def new_cache(self, batch_size: int, length: int) -> "owlet_kernels.Cache":
        return self.decoder.new_cache(batch_size, length)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: object = None) -> tuple[Tensor, Tensor | None]:
        """As GPT.forward."""
        self.config.check_fits(idx.size(1) + (cache.pos if cache else 0))
        if cache is not None:
            logits = self.decoder.forward(idx, cache, all=targets is not None)
        else:
            cache, logits = self.new_cache(1, idx.size(1)), []
            for row in idx:
                cache.pos = 0
                logits.append(self.decoder.forward(row[None], cache, all=True))
            logits = torch.cat(logits)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def new_writer(self, prompts: Tensor, new_tokens: int, draft: "KernelGPT | None", settings: dict) -> object:
        """csrc/writer.cpp for the prompts (B, T)."""
        return owlet_kernels.Writer(prompts=prompts, new_tokens=new_tokens, model=self.decoder,
                                    draft=draft.decoder if draft is not None else None, **settings)


# ---------------------------------------------------------------- quantizing, building

def quantize_state(model: GPT, slices: int = 1) -> dict[str, Tensor]:
    """The int8 folder's tensors: X.weight int8 and X.weight_scale; norms stay fp32; a tied head is left out.

    slices: of the columns of down_proj, each with a scale for each row: (N, slices).
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        tensor = tensor.detach()
        if tensor.dim() == 2:
            parts = slices if name.endswith("down_proj.weight") else 1
            q, scale = quantize_rows(tensor.reshape(len(tensor) * parts, -1))
            state[name], state[f"{name}_scale"] = q.view_as(tensor), scale.view(-1, parts) if parts > 1 else scale
        else:
            state[name] = tensor.float()
    return state


def build(config: GPTConfig, state: Mapping[str, Tensor], backend: str, device: torch.device,
          slices: int = 1, fine_head: bool = False) -> GPT | Int8GPT | KernelGPT:
    """The int8 model from quantize_state's tensors, on the device."""
    if backend == "torch.ao":
        model = torch_ao(dequantized(config, state))
        model.backend = backend
        return model
    flat = arrays(config, state, slices, fine_head)
    if backend == "owlet" and device.type == "cpu":
        return KernelGPT(config, flat)
    if backend == "reference":
        return Int8GPT(config, [t.clone().to(device) for t in flat], backend)  # without clones the whole file stays
    flat = [(tiles(t) if t.dtype == torch.int8 else t).to(device) for t in flat]
    model = Int8GPT(config, flat, f"owlet ({device.type})")
    model.add_decoder(flat)
    return model


def dequantized(config: GPTConfig, state: Mapping[str, Tensor]) -> GPT:
    """The fp32 model of quantize_state's tensors."""
    model, full = empty_model(config), {}
    for name, like in model.state_dict().items():
        name_ = "model.embed_tokens.weight" if name == "lm_head.weight" and config.tie_embeddings else name
        full[name] = state[name_].clone()
        if like.dim() == 2:
            scale = state[f"{name_}_scale"].reshape(len(like), -1)
            full[name] = (full[name].view(*scale.shape, -1) * scale[..., None]).flatten(1)
    model.load_state_dict(full, assign=True)
    return model.eval()


def quantize(model: GPT, backend: str = "auto") -> GPT | Int8GPT | KernelGPT:
    """The int8 copy of an fp32 model, on its device."""
    return build(model.config, quantize_state(model), pick_backend(backend, model.device), model.device)


# ---------------------------------------------------------------- the int8 folder

def save_quantized(model: GPT, folder: Path, fine_head: bool = False, slices: int = 1) -> None:
    """Write an fp32 model's int8 folder: row-major int8, which every machine packs for itself."""
    form = FORMAT | ({"fine": ["lm_head"]} if fine_head else {}) | ({"down_proj_slices": slices} if slices > 1 else {})
    write_model(folder, quantize_state(model, slices), model.config, quantization_config=form)


def read_quantized(folder: Path) -> tuple[GPTConfig, dict[str, Tensor], int, bool]:
    """Config, tensors, slices and whether the head is fine, of an int8 folder written by save_quantized."""
    hf = read_config(folder)
    where = f"{folder}/config.json: quantization_config"
    found = checked(hf.get("quantization_config"), dict, where)
    fine, slices = found.pop("fine", []), checked(found.pop("down_proj_slices", 1), int, f"{where}: down_proj_slices")
    config = config_from_hf(hf, folder / "config.json")
    if found != FORMAT or fine not in ([], ["lm_head"]) or slices not in range(1, 65) or config.n_hidden % slices:
        raise UserError(f"{where}: expected {FORMAT}, got {found} with fine = {fine} and down_proj_slices = {slices}")
    expected = {name: like for name, like in empty_model(config).state_dict().items()
                if not (name == "lm_head.weight" and config.tie_embeddings)}
    for name, like in [(name, like) for name, like in expected.items() if like.dim() == 2]:
        shape = (len(like), slices) if slices > 1 and name.endswith("down_proj.weight") else len(like)
        expected[name], expected[f"{name}_scale"] = like.to(torch.int8), torch.empty(shape, device="meta")
    state = read_tensors(folder)
    check_tensors(folder / "model.safetensors", expected, state)
    return config, state, slices, bool(fine)


def load_quantized(folder: Path, backend: str = "auto",
                   device: torch.device | str = "cpu") -> GPT | Int8GPT | KernelGPT:
    """Load an int8 folder written by save_quantized."""
    device, (config, state, slices, fine) = torch.device(device), read_quantized(Path(folder))
    return build(config, state, pick_backend(backend, device), device, slices, fine)
