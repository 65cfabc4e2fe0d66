"""owlet's int8 beside that of others: the same random weights through every engine, on the CPU.

    pip install -r requirements-peers.txt
    python tests/bench/bench_peers.py                              base and medium, on 1 and on 2 threads
    python tests/bench/bench_peers.py --sizes base --engines owlet llama.cpp-Q8_0 --rounds 9

Each engine lives in a process of its own, bound to as many cores as it may use, and is stopped (SIGSTOP) but when
it is its turn: threads of one that wait by spinning do not disturb another, and none has to wait in another way
than it does for its users. Turns go round by round (A B C A B C ...), so that a slow minute of the machine is
everybody's. What --out holds from an earlier run (models, converted) is used again; remove it to start afresh.
"""

import importlib.metadata
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import models
from torch import Tensor, nn
from tqdm import tqdm

sys.path.extend(str(Path(__file__).resolve().parents[2] / folder) for folder in (".", "data"))

from prepare import BYTES, train_tokenizer

import int8
import model as owlet
from checkpoint import load_model, save_model, weights_size
from cli import UserError, parse, run
from files import atomic_path, beside, write_json
from generate import generate
from int8 import stored_size, torch_ao
from machine import cpu_name
from model import GPT, SIZES, GPTConfig, KVCache

VOCABULARY = {"base": 256, "medium": 50257}
SHORT, NEW, LONG = 32, 200, 512  # tokens: the prompt before decoding, those decoded, the prompt that is timed
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # Linux alone binds processes
NONSENSE = 1.0  # an engine as far off as this runs another model; 4 bits, where all weights are noise, come to 0.6


# ---------------------------------------------------------------- the engines

class Engine:
    """One way to run a checkpoint folder: generate(ids, n, note) calls note with each of n greedy tokens, logits(ids)
    gives the last position's logits (V); size is that of the stored weights in bytes.
    """

    package = "torch"
    size: int

    def __init__(self, folder: Path, threads: int) -> None:
        raise NotImplementedError


class Stepping(Engine):
    """An engine that is fed tokens: feed(ids, fresh) continues its cache, or begins a new one, and returns logits."""

    def generate(self, ids: list[int], n: int, note: Callable[[int], bool]) -> None:
        for i in range(n):
            ids = [int(self.feed(ids, fresh=i == 0).argmax())]
            note(ids[0])

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.feed(ids, fresh=True)


class Owlet(Engine):
    def __init__(self, folder: Path, threads: int) -> None:
        if not beside(folder, "-int8").exists():
            int8.save_quantized(load_model(folder), beside(folder, "-int8"))
        self.model = int8.load_quantized(beside(folder, "-int8"), "owlet")
        self.size = weights_size(beside(folder, "-int8"))

    def generate(self, ids: list[int], n: int, note: Callable[[int], bool]) -> None:
        for token in generate(self.model, torch.tensor([ids]), n, temperature=0):
            note(int(token))

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), cache=self.model.new_cache(1, len(ids)))[0][0, -1].numpy()


class OwletInt8Cache(Owlet):
    """With keys and values in int8 as well, where llama.cpp has them in fp16 and the others in fp32."""

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__(folder, threads)
        self.model.int8_cache = True


class TorchAO(Owlet):
    """torch.ao.quantization.quantize_dynamic, PyTorch's old int8, on model.py."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.model = torch_ao(load_model(folder))
        self.size = stored_size(self.model)


class TorchAOCompiled(Owlet):
    """torchao's dynamic int8 (W8A8), PyTorch's new one, on model.py, compiled; embedding and head stay fp32."""

    package = "torchao"

    def __init__(self, folder: Path, threads: int) -> None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        torch._inductor.config.freezing = True  # with torch 2.13, logits are nonsense without
        self.model = load_model(folder).requires_grad_(False)
        quantize_(self.model, Int8DynamicActivationInt8WeightConfig(),  # the head by oneDNN's reference took 3 ms
                  lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
        self.size = stored_size(self.model)
        compiled = torch.compile(self.model.forward)

        def forward(idx: Tensor, targets: None = None, cache: KVCache | None = None) -> tuple[Tensor, None]:
            torch._dynamo.mark_static(idx)  # a kernel for each length of the prompt, and one for a token
            return compiled(idx, targets, cache)

        self.model.forward = forward


class Transformers(Stepping):
    package = "transformers"

    def __init__(self, folder: Path, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.size = weights_size(folder)

    @torch.inference_mode()
    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        out = self.model(torch.tensor([ids]), past_key_values=None if fresh else self.past, use_cache=True,
                         logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[0, -1].numpy()


class LlamaCpp(Stepping):
    package = "llama-cpp-python"

    def __init__(self, folder: Path, threads: int) -> None:
        from llama_cpp import Llama

        path = self.file(folder)
        block = load_model(folder).config.block_size
        self.llama, self.size = Llama(str(path), n_ctx=block, n_threads=threads, n_threads_batch=threads,
                                      flash_attn=True, verbose=False), path.stat().st_size

    def file(self, folder: Path) -> Path:
        from to_gguf import write_gguf

        path = beside(folder, ".gguf")
        if not path.exists():
            write_gguf(load_model(folder), folder, path)
        return path

    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        if fresh:
            self.llama.reset()
        self.llama.eval(ids)
        return np.ctypeslib.as_array(self.llama._ctx.get_logits_ith(-1), (self.llama.n_vocab(),))


class LlamaCppQ4(LlamaCpp):
    """llama-quantize's own Q4_0, from the Q8_0 file: embedding and head stay in more bits."""

    def file(self, folder: Path) -> Path:
        import llama_cpp

        path = beside(folder, "-Q4_0.gguf")
        if not path.exists():
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
            llama_cpp.llama_model_quantize(bytes(super().file(folder)), bytes(path), params)
        return path


class CTranslate2(Engine):
    package = "ctranslate2"

    def __init__(self, folder: Path, threads: int) -> None:
        import ctranslate2
        from transformers import AutoTokenizer

        out = beside(folder, "-ctranslate2")
        if not out.exists():
            ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out), quantization="int8")
        self.model = ctranslate2.Generator(str(out), intra_threads=threads)
        self.tokenizer, self.size = AutoTokenizer.from_pretrained(folder), (out / "model.bin").stat().st_size

    def generate(self, ids: list[int], n: int, note: Callable[[int], bool]) -> None:
        self.model.generate_batch([self.tokenizer.convert_ids_to_tokens(ids)], max_length=n, min_length=n,
                                  include_prompt_in_result=False, callback=lambda step: note(step.token_id))

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.model.forward_batch([ids]))[0, -1]


class PastCache(KVCache):
    """A cache as tracing sees it: keys and values come in as inputs, grow, and go out."""

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self.past, self.keys, self.pos = list(past), past[0], past[0].size(2)

    def update(self, layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
        here = slice(2 * layer, 2 * layer + 2)
        self.past[here] = [torch.cat((old, new), dim=2) for old, new in zip(self.past[here], (k, v), strict=True)]
        return self.past[here]


class Traceable(nn.Module):
    """ids (1, T), then keys and values (1, n_kv_head, P, head_dim) of each layer -> the last logits (1, V), the new
    keys and values (1, n_kv_head, P + T, head_dim).
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        owlet.RMSNorm.forward = lambda norm, x: x * (x.square().mean(-1, True) + norm.eps).rsqrt() * norm.weight

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = PastCache(past)
        logits, _ = self.model(ids, cache=cache)
        return logits[:, -1], *cache.past

    def example(self) -> tuple[Tensor, ...]:
        """Two tokens behind a past of three: the general case, of which every other is one."""
        config = self.model.config
        past = torch.zeros(2 * config.n_layer, 1, config.n_kv_head, 3, config.head_dim)
        return torch.zeros(1, 2, dtype=torch.long), *past


class OnnxRuntime(Stepping):
    package = "onnxruntime"

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        path = beside(folder, "-int8.onnx")
        if not path.exists():
            self.export(folder, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session, self.size = onnxruntime.InferenceSession(str(path), options), path.stat().st_size
        self.names = [node.name for node in self.session.get_inputs()]
        _, heads, _, head_dim = self.session.get_inputs()[1].shape
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy  # the cache stays in these, uncopied
        self.empty = [self.value(np.empty((1, heads, 0, head_dim), np.float32))] * (len(self.names) - 1)

    def export(self, folder: Path, path: Path) -> None:
        from onnxruntime.quantization import quantize_dynamic

        model = Traceable(load_model(folder))
        inputs, outputs = model.example(), len(model.example())
        names = [f"past.{i}" for i in range(outputs - 1)]
        with atomic_path(beside(folder, ".onnx")) as fp32, atomic_path(path) as small, torch.inference_mode():
            torch.onnx.export(model, inputs, fp32, input_names=["ids", *names], dynamo=False, opset_version=18,
                              output_names=["logits", *(f"new.{name}" for name in names)],
                              dynamic_axes={"ids": {1: "T"}} | {name: {2: "P"} for name in names})
            quantize_dynamic(fp32, small, per_channel=True)

    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        past = self.empty if fresh else self.past
        logits, *self.past = self.session.run_with_ort_values(
            None, dict(zip(self.names, [self.value(np.array([ids])), *past], strict=True)))
        return logits.numpy()[0]


class Compressed(nn.Module):
    """A matrix (N, K) in int8, to be multiplied by its rows' scales as it is used: OpenVINO knows this form, and
    computes it with int8 activations.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.small, scale = int8.quantize_rows(weight)
        self.scale = scale[:, None]

    @property
    def weight(self) -> Tensor:
        return self.small.float() * self.scale


class CompressedLinear(Compressed):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class CompressedEmbedding(Compressed):
    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.weight)


class OpenVINO(Stepping):
    package = "openvino"

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        path = beside(folder, "-openvino.xml")
        if not path.exists():
            self.export(folder, path)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
        self.size = path.with_suffix(".bin").stat().st_size

    def export(self, folder: Path, path: Path) -> None:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        model = load_model(folder).requires_grad_(False)
        for name, module in list(model.named_modules()):
            kind = {nn.Linear: CompressedLinear, nn.Embedding: CompressedEmbedding}.get(type(module))
            if kind:
                model.set_submodule(name, kind(module.weight))
        traceable = Traceable(model)
        ids, *past = traceable.example()
        _, heads, _, head_dim = past[0].shape
        graph = openvino.convert_model(traceable, example_input=(ids, *past),
                                       input=[[1, -1], *([1, heads, -1, head_dim] for _ in past)])
        apply_make_stateful_transformation(
            graph, list(zip(graph.get_parameters()[1:], graph.get_results()[1:], strict=True)))
        openvino.save_model(graph, path, compress_to_fp16=False)

    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        if fresh:
            self.request.reset_state()
        return self.request.infer([np.array([ids])])[0][0]


ENGINES = {
    "owlet": Owlet, "owlet-int8-cache": OwletInt8Cache, "torch.ao": TorchAO, "torchao-compiled": TorchAOCompiled,
    "transformers-fp32": Transformers, "llama.cpp-Q8_0": LlamaCpp, "llama.cpp-Q4_0": LlamaCppQ4,
    "CTranslate2": CTranslate2, "OpenVINO": OpenVINO, "ONNX-Runtime": OnnxRuntime,
}


# ---------------------------------------------------------------- an engine's process

def serve(name: str, folder: Path, threads: int) -> None:
    """Answer requests, one line of JSON each, on standard input and output."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like

    def reply(**answer: object) -> None:
        print(json.dumps(answer), file=channel, flush=True)

    torch.set_num_threads(threads)
    try:
        engine = ENGINES[name](folder, threads)
        reply(size=engine.size, version=importlib.metadata.version(engine.package))
        for line in sys.stdin:
            request = json.loads(line)
            if request["new"]:
                reply(**timed(engine, **request))
            else:
                reply(logits=engine.logits(request["ids"]).tolist())
    except ModuleNotFoundError as error:
        reply(error=f"not installed: {error.name}")
    except Exception as error:  # whatever stops one engine is a row of the table, and the others go on
        reply(error=" ".join(f"{type(error).__name__}: {error}".split())[:200])
        raise


def timed(engine: Engine, ids: list[int], new: int) -> dict:
    """Seconds until the first token, and from there to the last; and the tokens."""
    tokens, times = [], []

    def note(token: int) -> bool:
        tokens.append(token)
        times.append(time.perf_counter())
        return False  # CTranslate2 would take True for a wish to stop

    start = time.perf_counter()
    engine.generate(ids, new, note)
    return {"prompt": times[0] - start, "decode": times[-1] - times[0], "tokens": tokens}


class EngineError(Exception):
    pass


class Worker:
    """An engine's process, seen from here, and its row of the table. It runs only while it is asked something."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name, self.folder, self.threads, self.process = name, folder, threads, None
        self.row = {"decode": [], "prompt": []}

    def start(self) -> None:
        command = [sys.executable, __file__, "--serve", self.name, str(self.folder), str(self.threads)]
        with beside(self.folder, f"-{self.name}.log").open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
                preexec_fn=partial(os.sched_setaffinity, 0, CORES[:self.threads]))
        self.row |= self.answer()

    def ask(self, ids: list[int], new: int) -> dict:
        self.process.send_signal(signal.SIGCONT)
        print(json.dumps({"ids": ids, "new": new}), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise EngineError(signal.strsignal(-code) if code < 0 else f"ended with exit code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


# ---------------------------------------------------------------- the contest

def make_checkpoint(size: str, out: Path) -> Path:
    """An fp32 folder of random weights, none at a special value, whose blocks count for more than the embedding."""
    folder, vocab_size = out / size, VOCABULARY[size]
    if (folder / "config.json").exists():
        return folder
    tokenizer = train_tokenizer([], 256)
    pairs = list(itertools.islice(itertools.product(BYTES, repeat=2), vocab_size - len(BYTES)))
    vocab = [*BYTES, *map("".join, pairs)]
    tokenizer.model = models.BPE(vocab={text: token for token, text in enumerate(vocab)}, merges=pairs)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), vocab[0])  # CTranslate2 has no model without
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, **SIZES[size]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.04)
    save_model(model, folder)
    return folder


@torch.inference_mode()
def check(worker: Worker, reference: GPT, prompt: list[int]) -> dict[str, float]:
    """How far off an engine is: its logits, relative to fp32's, and, of the tokens it decodes, how much less fp32
    thinks of them than of its own choice, in standard deviations of its logits (4 or so for tokens at random).
    """
    tokens = worker.ask(prompt, NEW)["tokens"]
    if len(tokens) != NEW:
        raise EngineError(f"decoded {len(tokens)} tokens instead of {NEW}")
    logits = torch.tensor(worker.ask(prompt, 0)["logits"])
    exact = reference(torch.tensor([prompt + tokens]))[0][0, len(prompt) - 1:-1]  # (NEW, V)
    chosen = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    off = {"logits_off": ((logits - exact[0]).norm() / exact[0].norm()).item(),
           "choices_off": ((exact.amax(1) - chosen) / exact.std(1)).mean().item()}
    if not max(off.values()) < NONSENSE:
        raise EngineError(f"computes something else: {off}")
    return off


def contest(folder: Path, threads: int, names: tuple[str, ...], rounds: int) -> dict[str, dict]:
    """A row an engine: its speeds in tokens a second, one a round; or the error for which it has none."""
    reference = load_model(folder)
    ids = torch.randint(reference.config.vocab_size, (LONG,), generator=torch.Generator().manual_seed(1)).tolist()
    workers = [Worker(name, folder, threads) for name in names]
    bar = tqdm(total=(rounds + 1) * len(workers), desc=f"{folder.name}, {threads} threads", disable=None, leave=False)
    try:
        for turn, worker in itertools.product(range(rounds + 1), workers):
            bar.update()
            if "error" in worker.row:
                continue
            try:
                if turn == 0:  # which also warms it up
                    worker.start()
                    worker.row |= check(worker, reference, ids[:SHORT])
                    worker.ask(ids, 1)
                else:
                    worker.row["decode"].append((NEW - 1) / worker.ask(ids[:SHORT], NEW)["decode"])
                    worker.row["prompt"].append(LONG / worker.ask(ids, 1)["prompt"])
            except EngineError as error:
                worker.row = {"error": str(error)}
    finally:
        for worker in workers:
            worker.close()
    bar.close()
    return {worker.name: worker.row for worker in workers}


def spread(speeds: list[float]) -> str:
    """1,234 ±5%: the median, and how far the farthest round was from it."""
    middle = statistics.median(speeds)
    return f"{middle:,.0f} ±{max(abs(speed / middle - 1) for speed in speeds):.0%}"


def table(result: dict, size: str) -> str:
    """One size as a Markdown table; GB/s are of int8 weights, one byte each, whatever the engine stores."""
    columns = [f"{what}, {threads}T" for threads in result["threads"]
               for what in ("decode tok/s", "GB/s", "prompt tok/s")]
    lines = [f"| `{size}`, {result['weights'][size] / 1e6:.1f}M | file MB | logits off | choices off | "
             f"{' | '.join(columns)} |", f"|---|{'--:|' * (3 + len(columns))}"]
    for name in result["engines"]:
        rows = [result["speeds"][size][threads][name] for threads in result["threads"]]
        about = next((row for row in rows if "error" not in row), None)
        cells = [f"{about['size'] / 1e6:.1f}", f"{about['logits_off']:.2%}",
                 f"{about['choices_off']:.4f}"] if about else ["", "", ""]
        for row in rows:
            if "error" in row:
                cells += [row["error"], "", ""]
            else:
                bandwidth = statistics.median(row["decode"]) * result["weights"][size] / 1e9
                cells += [spread(row["decode"]), f"{bandwidth:.1f}", spread(row["prompt"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, threads = result["engines"], result["threads"]
    figure, axes = plt.subplots(len(result["speeds"]), 2, squeeze=False, layout="constrained",
                                figsize=(11, len(result["speeds"]) * (1 + 0.22 * len(names) * len(threads))))
    for (size, speeds), row in zip(result["speeds"].items(), axes, strict=True):
        for axis, phase in zip(row, ("decode", "prompt"), strict=True):
            for i, count in enumerate(threads):
                medians = [statistics.median(speeds[count][name].get(phase, [0])) for name in names]
                places = np.arange(len(names)) + 0.8 * (i + 0.5) / len(threads)
                bars = axis.barh(places, medians, 0.8 / len(threads), label=f"{count} thread{'s' * (count > 1)}",
                                 color=plt.cm.Blues(0.9 - 0.5 * i / len(threads)))
                axis.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
            axis.set_yticks(np.arange(len(names)) + 0.4, names, fontsize=8)
            axis.invert_yaxis()
            axis.set_title(f"{size}, {result['weights'][size] / 1e6:.0f}M: {phase}, tokens/s", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(threads),
                  frameon=False, fontsize=8)
    figure.suptitle(result["machine"], fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- command line

@dataclass
class PeersConfig:
    sizes: tuple[Literal["base", "medium"], ...] = ("base", "medium")
    """Models of random weights: base with a vocabulary of 256, medium with one of 50,257."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, and cores to run on; each number is a contest of its own."""
    rounds: int = 5
    """Turns of each engine that count; one more warms it up."""
    engines: tuple[Literal[tuple(ENGINES)], ...] = tuple(ENGINES)
    out: Path = Path("out/peers")
    """Folder for the models, converted for each engine, and for peers.json and peers.png."""


def main() -> None:
    config = parse(PeersConfig, "owlet's int8 beside that of others: the same weights through every engine.")
    if not CORES:
        raise UserError("bench_peers.py: needs Linux, where a process can be bound to its cores")
    for flag, values, most in (("threads", config.threads, len(CORES)), ("rounds", [config.rounds], 1000)):
        if not values or not all(1 <= value <= most for value in values):
            raise UserError(f"--{flag}: expected 1 to {most}, got {' '.join(map(str, values)) or 'nothing'}")
    result = {"machine": cpu_name(), "torch": torch.__version__, "threads": config.threads, "rounds": config.rounds,
              "engines": config.engines, "weights": {}, "speeds": {}}
    for size in config.sizes:
        folder = make_checkpoint(size, config.out)
        result["weights"][size] = load_model(folder).num_params()
        result["speeds"][size] = {threads: contest(folder, threads, config.engines, config.rounds)
                                  for threads in config.threads}
        print(f"{table(result, size)}\n")
    versions = {name: row["version"] for speeds in result["speeds"].values() for rows in speeds.values()
                for name, row in rows.items() if "version" in row}
    write_json(config.out / "peers.json", result)
    draw(result, config.out / "peers.png")
    print(f"{result['machine']}, torch {result['torch']}; {config.rounds} rounds, medians and the farthest of them; "
          f"decode: {NEW} tokens after {SHORT}, prompt: {LONG}\n"
          f"{', '.join(f'{name} {version}' for name, version in versions.items())}\n"
          f"also in {config.out}/peers.json and .png; what the engines said in {config.out}/*.log")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        name, folder, threads = sys.argv[2:]
        serve(name, Path(folder), int(threads))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no stopped process stays behind
        run(main)
