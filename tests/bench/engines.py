"""The engines of bench_peers.py: ways to run a checkpoint folder on the CPU.

An engine imports its packages itself, so that a missing one stops no other engine.
"""

import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import report  # noqa: F401  makes the modules below importable
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8
from generate import generate
from lib.checkpoint import load_model, stored_size, weights_size
from lib.files import atomic_path, beside
from model import GPT, KVCache, RMSNorm


class Engine:
    """Loads a checkpoint folder, of which an engine with a format of its own first makes FOLDER + `ending`, once.

    `size` is the bytes of its stored weights. An engine fed token by token implements feed(ids, fresh): it continues
    its cache, or begins a new one, and returns the last position's logits (V). Others implement generate and logits.
    """

    package, ending = "torch", ""
    size: int

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.path = beside(folder, self.ending)
        if not self.path.exists():
            self.convert(folder)
        self.load(folder, threads)

    def about(self) -> dict[str, float | str]:
        return {"megabytes": self.size / 1e6, "version": importlib.metadata.version(self.package)}

    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        raise NotImplementedError

    def timed(self, ids: list[int], n: int) -> dict:
        """Seconds until the first of n greedy tokens, and from there to the last; and the tokens."""
        tokens, times = [], []

        def note(token: int) -> bool:
            tokens.append(token)
            times.append(time.perf_counter())
            return False  # True would stop CTranslate2

        start = time.perf_counter()
        self.generate(ids, n, note)
        return {"prompt": times[0] - start, "decode": times[-1] - times[0], "tokens": tokens}

    def generate(self, ids: list[int], n: int, note: Callable[[int], bool]) -> None:
        """Call note with each of n greedy tokens."""
        for i in range(n):
            ids = [int(self.feed(ids, fresh=i == 0).argmax())]
            note(ids[0])

    def logits(self, ids: list[int]) -> np.ndarray:
        """The last position's logits (V)."""
        return self.feed(ids, fresh=True)


# ---------------------------------------------------------------- PyTorch

class Owlet(Engine):
    """Keys and values are int8. llama.cpp's are fp16, those of the others fp32."""

    ending = "-int8"

    def convert(self, folder: Path) -> None:
        int8.save_quantized(load_model(folder), self.path)

    def load(self, folder: Path, threads: int) -> None:
        self.model, self.size = int8.load_quantized(self.path, "owlet"), weights_size(self.path)

    def generate(self, ids: list[int], n: int, note: Callable[[int], bool]) -> None:
        for token in generate(self.model, torch.tensor([ids]), n, temperature=0, most_guesses=0):
            note(int(token))

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), cache=self.model.new_cache(1, len(ids)))[0][0, -1].numpy()


class TorchAO(Owlet):
    """torch.ao.quantization.quantize_dynamic, PyTorch's old int8, on model.py."""

    ending = ""

    def load(self, folder: Path, threads: int) -> None:
        self.model = int8.torch_ao(load_model(folder))
        self.size = stored_size(self.model.state_dict())


class Transformers(Engine):
    package = "transformers"

    def load(self, folder: Path, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.size = weights_size(folder)

    @torch.inference_mode()
    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        out = self.model(torch.tensor([ids]), past_key_values=None if fresh else self.past, use_cache=True,
                         logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[0, -1].numpy()


# ---------------------------------------------------------------- engines with formats of their own

class LlamaCpp(Engine):
    package, ending = "llama-cpp-python", ".gguf"

    def convert(self, folder: Path) -> None:
        from lib.gguf import write_gguf

        write_gguf(load_model(folder), folder, self.path)

    def load(self, folder: Path, threads: int) -> None:
        from llama_cpp import Llama

        self.llama, self.size = Llama(str(self.path), n_ctx=0, n_threads=threads, n_threads_batch=threads,
                                      flash_attn=True, verbose=False), self.path.stat().st_size

    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        if fresh:
            self.llama.reset()
        self.llama.eval(ids)
        return np.ctypeslib.as_array(self.llama._ctx.get_logits_ith(-1), (self.llama.n_vocab(),))


class LlamaCppQ4(LlamaCpp):
    """llama-quantize's own Q4_0, from the Q8_0 file: embedding and head keep more bits."""

    ending = "-Q4_0.gguf"

    def convert(self, folder: Path) -> None:
        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        large = LlamaCpp(folder, threads=1).path  # made if it is not there
        llama_cpp.llama_model_quantize(bytes(large), bytes(self.path), params)


class CTranslate2(Engine):
    package, ending = "ctranslate2", "-ctranslate2"

    def convert(self, folder: Path) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder)).convert(str(self.path), quantization="int8")

    def load(self, folder: Path, threads: int) -> None:
        from ctranslate2 import Generator
        from transformers import AutoTokenizer

        self.model = Generator(str(self.path), intra_threads=threads)
        self.tokenizer, self.size = AutoTokenizer.from_pretrained(folder), (self.path / "model.bin").stat().st_size

    def generate(self, ids: list[int], n: int, note: Callable[[int], bool]) -> None:
        self.model.generate_batch([self.tokenizer.convert_ids_to_tokens(ids)], max_length=n, min_length=n,
                                  include_prompt_in_result=False, callback=lambda step: note(step.token_id))

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.model.forward_batch([ids]))[0, -1]


class OnnxRuntime(Engine):
    package, ending = "onnxruntime", "-int8.onnx"

    def convert(self, folder: Path) -> None:
        from onnxruntime.quantization import quantize_dynamic

        model = Traceable(load_model(folder))
        inputs = model.example()
        names = [f"past.{i}" for i in range(len(inputs) - 1)]
        with atomic_path(beside(folder, ".onnx")) as fp32, atomic_path(self.path) as small, torch.inference_mode():
            torch.onnx.export(model, inputs, fp32, input_names=["ids", *names], dynamo=False, opset_version=18,
                              output_names=["logits", *(f"new.{name}" for name in names)],
                              dynamic_axes={"ids": {1: "T"}} | {name: {2: "P"} for name in names})
            quantize_dynamic(fp32, small, per_channel=True)

    def load(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session, self.size = onnxruntime.InferenceSession(self.path, options), self.path.stat().st_size
        self.names = [node.name for node in self.session.get_inputs()]
        _, heads, _, head_dim = self.session.get_inputs()[1].shape
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy  # the cache stays in these, uncopied
        self.empty = [self.value(np.empty((1, heads, 0, head_dim), np.float32))] * (len(self.names) - 1)

    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        past = self.empty if fresh else self.past
        logits, *self.past = self.session.run_with_ort_values(
            None, dict(zip(self.names, [self.value(np.array([ids])), *past], strict=True)))
        return logits.numpy()[0]


class OpenVINO(Engine):
    package, ending = "openvino", "-openvino.xml"

    def convert(self, folder: Path) -> None:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        model = load_model(folder).requires_grad_(False)
        for name, module in list(model.named_modules()):
            if type(module) in (nn.Linear, nn.Embedding):
                model.set_submodule(name, Compressed(module))
        traceable = Traceable(model)
        ids, *past = traceable.example()
        _, heads, _, head_dim = past[0].shape
        graph = openvino.convert_model(traceable, example_input=(ids, *past),
                                       input=[[1, -1], *([1, heads, -1, head_dim] for _ in past)])
        apply_make_stateful_transformation(
            graph, list(zip(graph.get_parameters()[1:], graph.get_results()[1:], strict=True)))
        openvino.save_model(graph, self.path, compress_to_fp16=False)

    def load(self, folder: Path, threads: int) -> None:
        import openvino

        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.request = openvino.Core().compile_model(self.path, "CPU", options).create_infer_request()
        self.size = self.path.with_suffix(".bin").stat().st_size

    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        if fresh:
            self.request.reset_state()
        return self.request.infer([np.array([ids])])[0][0]


# ---------------------------------------------------------------- model.py, exported

class Compressed(nn.Module):
    """A linear layer or embedding whose matrix (N, K) is int8 and multiplied by its rows' scales as it is used.
    OpenVINO recognizes this form and computes it with int8 activations.
    """

    def __init__(self, module: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        self.use = F.linear if isinstance(module, nn.Linear) else F.embedding
        self.small, scale = int8.quantize_rows(module.weight)
        self.scale = scale[:, None]

    @property
    def weight(self) -> Tensor:
        return self.small.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


class PastCache(KVCache):
    """A cache for tracing: keys and values come in as inputs, grow, and go out."""

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self.past, self.keys, self.pos = list(past), past[0], past[0].size(2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        here = slice(2 * layer, 2 * layer + 2)
        self.past[here] = [torch.cat((old, new), dim=2) for old, new in zip(self.past[here], (k, v), strict=True)]
        return F.scaled_dot_product_attention(q, *self.past[here], mask)


class Traceable(nn.Module):
    """ids (1, T), then keys and values (1, n_kv_head, P, head_dim) of each layer -> the last logits (1, V), the new
    keys and values (1, n_kv_head, P + T, head_dim).
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        RMSNorm.forward = lambda norm, x: x * (x.square().mean(-1, True) + norm.eps).rsqrt() * norm.weight

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = PastCache(past)
        logits, _ = self.model(ids, cache=cache)
        return logits[:, -1], *cache.past

    def example(self) -> tuple[Tensor, ...]:
        """Two tokens behind a past of three: the general case, which covers every other."""
        config = self.model.config
        past = torch.zeros(2 * config.n_layer, 1, config.n_kv_head, 3, config.head_dim)
        return torch.zeros(1, 2, dtype=torch.long), *past


ENGINES = {
    "owlet": Owlet, "torch.ao": TorchAO, "transformers-fp32": Transformers, "llama.cpp-Q8_0": LlamaCpp,
    "llama.cpp-Q4_0": LlamaCppQ4, "CTranslate2": CTranslate2, "OpenVINO": OpenVINO, "ONNX-Runtime": OnnxRuntime,
}
