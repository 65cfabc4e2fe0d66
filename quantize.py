"""Shrink a checkpoint to int8, and show what that costs and brings.

    python quantize.py                               the newest checkpoint under out/ -> out/NAME-int8
    python quantize.py --checkpoint out/mybook-small

Weights: symmetric int8, one fp32 scale for each output channel. Activations: symmetric int8, one
scale for each token, found as the model runs ("dynamic"). Products are summed exactly in int32.
"""

import copy
import io
import itertools
import multiprocessing
import platform
import re
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import (
    atomic_path,
    by_age,
    copy_tokenizer,
    read_config,
    read_state,
    read_tensors,
    weight_files,
    write_json,
)
from cli import UserError, parse, run
from model import GPT, Block, GPTConfig, KVCache, Uninitialised, check_tensors, generate, write_model
from train import TokenData, evaluate

try:
    import owlet_kernels  # registers torch.ops.owlet
except ImportError as error:
    owlet_kernels = None
    why_no_kernels = f"owlet's int8 kernels are not built ({error}); build them with: python setup.py build_ext"

Backend = Literal["owlet", "torch.ao", "reference"]
LONGEST = 1024  # tokens of context the comparison works with, where a model has more

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
    inverse = torch.where(amax >= 1e-30, 127 / amax, 0.0)
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


def pick_backend(name: str, device: torch.device) -> Backend:
    """auto: the fastest that is here. A missing extension is said, with the cure."""
    if name == "owlet" and owlet_kernels is None:
        raise UserError(f"--backend owlet: {why_no_kernels}")
    if name == "torch.ao" and not (has_torch_ao() and device.type == "cpu"):
        raise UserError("--backend torch.ao: needs a CPU and a torch that still has torch.ao.quantization")
    if name != "auto":
        return name
    if owlet_kernels is not None:
        return "owlet"
    fallback = "torch.ao" if has_torch_ao() and device.type == "cpu" else "reference"
    print(f"note: {why_no_kernels}; going on with {fallback}", file=sys.stderr)
    return fallback


class Int8Linear(nn.Module):
    """y = activation(x W^T) + residual with W in int8, by one of three backends.

    weight (N, K) int8 and scale (N,) fp32 from quantize_rows; x (..., K) fp32 -> (..., N) fp32.
    """

    def __init__(self, weight: Tensor, scale: Tensor, backend: Backend, activation: str = "none") -> None:
        super().__init__()
        self.backend, self.activation, self.in_features = backend, activation, weight.size(1)
        self.register_buffer("scale", scale)
        if backend == "owlet":
            self.register_buffer("weight", torch.ops.owlet.pack_int8(weight))
        else:
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
        if self.backend == "owlet":  # packed (N / 64, K / 4, 64, 4), each value + 128
            row = self.weight[idx // 64, :, idx % 64].flatten(-2)[..., :self.in_features].to(torch.int16) - 128
        else:
            row = self.weight[idx]
        return row * self.scale[idx].unsqueeze(-1)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv_proj(self.input_layernorm(x)).split(self.widths, dim=-1)
        x = self.o_proj(self.self_attn.attend(q, k, v, cos, sin, cache), residual=x)
        return self.down_proj(self.gate_up_proj(self.post_attention_layernorm(x)), residual=x)


class Int8GPT(GPT):
    """A GPT of Int8Linear matrices. On a CPU with the kernels, one token at a time goes through the
    C++ decoder (csrc/decoder.cpp): the same arithmetic over the same weights and cache, in one call.
    """

    decoder = None

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        if self.decoder is None or cache is None or idx.shape != (1, 1) or targets is not None:
            return super().forward(idx, targets, cache)
        self.check_fits(cache.pos + 1)
        logits = self.decoder.forward(idx.item(), cache.pos, cache.keys, cache.values)
        cache.pos += 1
        return logits, None

    def make_decoder(self) -> "owlet_kernels.Decoder":
        config, layers = self.config, self.model.layers

        def matrix(linear: Int8Linear) -> tuple[Tensor, Tensor]:
            return linear.weight, linear.scale

        return owlet_kernels.Decoder(
            n_embd=config.n_embd, n_head=config.n_head, n_kv_head=config.n_kv_head, head_dim=config.head_dim,
            n_hidden=config.n_hidden, norm_eps=config.norm_eps, cos=self.cos, sin=self.sin,
            embedding=matrix(self.model.embed_tokens.matrix), norm=self.model.norm.weight, head=matrix(self.lm_head),
            blocks=[(block.input_layernorm.weight, matrix(block.qkv_proj),
                     block.self_attn.q_norm.weight if config.qk_norm else None,
                     block.self_attn.k_norm.weight if config.qk_norm else None,
                     matrix(block.o_proj), block.post_attention_layernorm.weight,
                     matrix(block.gate_up_proj), matrix(block.down_proj)) for block in layers])


def quantize_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fp32 state dict -> the int8 folder's: X.weight int8 and X.weight_scale; norms stay fp32."""
    small = {}
    for name, tensor in state.items():
        if tensor.dim() == 2:
            small[name], small[f"{name}_scale"] = quantize_rows(tensor)
        else:
            small[name] = tensor.float()
    return small


def build(config: GPTConfig, state: dict[str, Tensor], backend: Backend, device: torch.device) -> Int8GPT:
    """The int8 model from quantize_state's tensors, on the device."""

    def linear(prefix: str, *names: str, activation: str = "none") -> Int8Linear:
        weights = [state[f"{prefix}{name}.weight"] for name in names]
        scales = [state[f"{prefix}{name}.weight_scale"] for name in names]
        if activation == "swiglu":  # row 2i: gate i, row 2i + 1: up i
            weight, scale = (torch.stack(parts, dim=1).flatten(0, 1) for parts in (weights, scales))
        else:
            weight, scale = torch.cat(weights), torch.cat(scales)
        return Int8Linear(weight, scale, backend, activation)

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
        backend if backend == "owlet" else "reference")
    model.model["embed_tokens"] = Int8Embedding(table)
    model.backend = f"{backend} ({owlet_kernels.isa()})" if backend == "owlet" else backend
    model = model.eval().requires_grad_(False).to(device)
    if backend == "owlet" and device.type == "cpu":
        model.decoder = model.make_decoder()
    return model


def quantize(model: GPT, backend: str = "auto") -> Int8GPT:
    """The int8 copy of an fp32 model, on the CPU."""
    state = quantize_state({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    cpu = torch.device("cpu")
    return build(model.config, state, pick_backend(backend, cpu), cpu)


def save_quantized(model: GPT, folder: Path) -> None:
    """Write an fp32 model's int8 folder: row-major int8, as every machine can pack it for itself."""
    state = quantize_state({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    if model.config.tie_embeddings:
        del state["lm_head.weight"], state["lm_head.weight_scale"]
    write_model(folder, state, model.config.to_hf() | {"quantization_config": FORMAT})


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


# ---------------------------------------------------------------- what it costs, what it brings

def torch_ao(model: GPT) -> GPT:
    """PyTorch's own dynamic int8 of the same model: linear layers only, the embedding stays fp32."""
    with warnings.catch_warnings(action="ignore"):  # deprecated: a yardstick here, and no more
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def contenders(folder: Path, backend: Backend) -> dict[str, Callable[[], GPT]]:
    """How each row of the table comes by its model; ours is the last."""
    rows = {"fp32": lambda: GPT.from_pretrained(folder)}
    if has_torch_ao():
        rows["torch.ao int8"] = lambda: torch_ao(GPT.from_pretrained(folder))
    ours = "owlet int8" if backend == "owlet" else f"owlet's format by {backend}"
    rows[ours] = lambda: from_pretrained(int8_folder(folder), backend)
    return rows


def int8_folder(folder: Path) -> Path:
    folder = folder if folder.name else folder.resolve()  # "." has no name to add to
    return folder.with_name(f"{folder.name}-int8")


def file_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))


def resident_memory(row: str, folder: Path, backend: Backend, threads: int) -> int:
    """Bytes that loading and running the model adds to a fresh process; called in one."""
    torch.set_num_threads(threads)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    list(generate(quantize(GPT(GPTConfig(n_layer=1)), "reference"), prompt, 8))  # libraries load what they load
    before = rss()
    model = contenders(folder, backend)[row]()
    list(generate(model, prompt, min(model.config.block_size, LONGEST) // 2))
    return rss() - before


def rss() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def tokens_per_second(models: dict[str, GPT], rounds: int, tick: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Median speed of the prompt and of decoding after it, the models taking turns round by round."""
    config = next(iter(models.values())).config
    block = min(config.block_size, LONGEST)
    prompt = torch.randint(0, config.vocab_size, (1, block), generator=torch.Generator().manual_seed(1))
    new = min(128, block // 2)
    times = {name: {"prompt": [], "decode": []} for name in models}
    for _, (name, model) in itertools.product(range(rounds + 1), models.items()):  # the first is the warm-up
        start = time.perf_counter()
        list(generate(model, prompt, 1, temperature=0))
        middle = time.perf_counter()
        list(generate(model, prompt[:, :1], new, temperature=0))
        times[name]["prompt"].append(block / (middle - start))
        times[name]["decode"].append(new / (time.perf_counter() - middle))
        tick()
    return {name: {phase: statistics.median(values[1:]) for phase, values in of.items()}
            for name, of in times.items()}


def stored_size(model: GPT) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def compare(folder: Path, data: TokenData | None, backend: Backend, eval_tokens: int) -> dict:
    """One row a contender: size, memory, loss, speed. data None: no losses."""
    models = {name: make() for name, make in contenders(folder, backend).items()}
    sizes = {name: stored_size(model) for name, model in models.items()}
    ours = list(models)[-1]
    sizes["fp32"], sizes[ours] = file_size(folder), file_size(int8_folder(folder))
    rows, rounds = {}, 5
    bar = tqdm(total=(rounds + 3) * len(models), desc="comparing", disable=None, leave=False)
    speeds = tokens_per_second(models, rounds, bar.update)
    for name, model in models.items():
        bits = evaluate(model, data, eval_tokens) * data.bits_per_nat if data is not None else None
        bar.update()
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            memory = fresh.apply(resident_memory, (name, folder, backend, torch.get_num_threads()))
        bar.update()
        base = rows["fp32"]["bits_per_byte"] if rows else bits
        rows[name] = {
            "file_bytes": sizes[name], "file_share": sizes[name] / sizes["fp32"], "memory_bytes": memory,
            "bits_per_byte": bits, "bits_per_byte_change": bits / base - 1 if data is not None else None,
            "prompt_tokens_per_second": speeds[name]["prompt"], "decode_tokens_per_second": speeds[name]["decode"]}
    bar.close()
    return {"model": folder.name, "parameters": models["fp32"].num_params(), "backend": models[ours].backend,
            "threads": torch.get_num_threads(), "cpu": cpu_name(), "torch": torch.__version__, "rows": rows}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def table(result: dict) -> str:
    """The comparison as a Markdown table."""
    lines = ["| model | file MB | of fp32 | memory MB | bits/byte | change | prompt tok/s | decode tok/s |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for name, row in result["rows"].items():
        has_loss = row["bits_per_byte"] is not None
        loss = f"{row['bits_per_byte']:.4f} | {row['bits_per_byte_change']:+.3%}" if has_loss else "- | -"
        lines.append(f"| {name} | {row['file_bytes'] / 1e6:.2f} | {row['file_share']:.1%} "
                     f"| {row['memory_bytes'] / 1e6:.1f} | {loss} | {row['prompt_tokens_per_second']:,.0f} "
                     f"| {row['decode_tokens_per_second']:,.0f} |")
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"file_bytes": ("file, MB  ↓", 1e-6), "memory_bytes": ("memory, MB  ↓", 1e-6),
              "bits_per_byte": ("bits per byte  ↓", 1), "prompt_tokens_per_second": ("prompt, tokens/s  ↑", 1),
              "decode_tokens_per_second": ("decode, tokens/s  ↑", 1)}
    panels = {key: value for key, value in panels.items() if result["rows"]["fp32"][key] is not None}
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 3.2), layout="constrained")
    names = list(result["rows"])
    for axis, (key, (title, unit)) in zip(axes, panels.items(), strict=True):
        bars = axis.bar(names, [result["rows"][name][key] * unit for name in names],
                        color=["#bdbdbd", "#9ecae1", "#08519c"][-len(names):])
        digits = "{:.3f}" if key == "bits_per_byte" else "{:,.0f}" if unit == 1 else "{:,.3g}"
        axis.bar_label(bars, fmt=digits, fontsize=8)
        axis.set_title(title, fontsize=10)  # the arrow points to better
        axis.tick_params(axis="x", labelrotation=30, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['model']}: {result['parameters'] / 1e6:.1f}M parameters, {result['threads']} threads")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- command line

@dataclass
class QuantizeConfig:
    checkpoint: Path | None = None
    """fp32 folder to shrink; default: the newest under out/. Writes FOLDER-int8."""
    compare: bool = True
    """Measure size, memory, loss and speed against fp32 and torch.ao."""
    data: Path | None = None
    """Prepared folder to measure the loss on; default: the one the model was trained on."""
    eval_tokens: int = 100_000
    """Validation tokens to measure the loss on, spread evenly."""
    backend: Literal["auto", "owlet", "torch.ao", "reference"] = "auto"
    """Who multiplies in int8; auto takes the fastest there is."""
    threads: int | None = None
    """CPU threads; default: PyTorch's choice."""


def newest_fp32(root: Path) -> Path:
    """The newest folder under root that is not itself an int8 one."""
    for folder in by_age(root, "model.safetensors", "python train.py"):
        if "quantization_config" not in read_config(folder):
            return folder
    raise UserError(f"{root}/: only int8 folders there; make an fp32 one with `python train.py`")


def validation_data(config: QuantizeConfig, folder: Path, model: GPTConfig) -> TokenData | None:
    source = config.data
    if source is None:
        state = folder / "train_state.pt"
        source = Path(read_state(state, mmap=True)["config"]["data"]) if state.exists() else None
        if source is None or not (source / "meta.json").exists():
            print("note: the data this model was trained on is not here, so the table has no losses; "
                  "name prepared data with --data")
            return None
    data = TokenData(source, min(model.block_size, LONGEST))
    if data.meta["vocab_size"] > model.vocab_size:
        raise UserError(f"--data {source}: has {data.meta['vocab_size']} different tokens, "
                        f"the model knows {model.vocab_size}")
    return data


def main() -> None:
    config = parse(QuantizeConfig, "Shrink a checkpoint to int8, and show what that costs and brings.")
    for flag, value in (("threads", config.threads), ("eval-tokens", config.eval_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--{flag}: expected 1 or more, got {value}")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    folder = config.checkpoint or newest_fp32(Path("out"))
    model, out = GPT.from_pretrained(folder), int8_folder(folder)
    save_quantized(model, out)
    copy_tokenizer(folder, out)
    before, after = file_size(folder), file_size(out)
    print(f"{folder} -> {out}: {before / 1e6:.2f} -> {after / 1e6:.2f} MB ({after / before:.1%})")
    if config.compare:
        data = validation_data(config, folder, model.config)
        del model
        result = compare(folder, data, pick_backend(config.backend, torch.device("cpu")), config.eval_tokens)
        write_json(out / "comparison.json", result)
        draw(result, out / "comparison.png")
        print(f"\n{table(result)}\n\n{result['backend']}, {result['threads']} threads, {result['cpu']}; "
              f"also in {out}/comparison.json and .png")
    print(f"next: python sample.py --checkpoint {out}")


if __name__ == "__main__":
    run(main)
