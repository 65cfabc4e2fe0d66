"""The engines of bench_peers.py: ways to run a checkpoint folder on the CPU.

An engine converts the folder to its own format and leaves that beside it for the next time. It imports its packages
itself, so that a missing one stops no other engine.
"""

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
    """Loads a checkpoint folder. `size` is the bytes of its stored weights.

    An engine fed token by token implements feed(ids, fresh): it continues its cache, or begins a new one, and returns
    the last position's logits (V). Others implement generate and logits.
    """

    package = "torch"
    size: int

    def __init__(self, folder: Path, threads: int) -> None:
        raise NotImplementedError

    def feed(self, ids: list[int], fresh: bool) -> np.ndarray:
        raise NotImplementedError

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

    def __init__(self, folder: Path, threads: int) -> None:
        small = beside(folder, "-int8")
        if not small.exists():
            int8.save_quantized(load_model(folder), small)
        self.model, self.size = int8.load_quantized(small, "owlet"), weights_size(small)

    def generate(self, ids: list[int], n: int, note: Callable[[int], bool]) -> None:
        for token in generate(self.model, torch.tensor([ids]), n, temperature=0, most_guesses=0):
            note(int(token))

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), cache=self.model.new_cache(1, len(ids)))[0][0, -1].numpy()


class TorchAO(Owlet):
    """torch.ao.quantization.quantize_dynamic, PyTorch's old int8, on model.py."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.model = int8.torch_ao(load_model(folder))
        self.size = stored_size(self.model.state_dict())


class TorchAOCompiled(Owlet):
    """torchao's dynamic int8 (W8A8), PyTorch's new one, on model.py, compiled; embedding and head stay fp32."""

    package = "torchao"

    def __init__(self, folder: Path, threads: int) -> None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        torch._inductor.config.freezing = True  # without it, torch 2.13 computes wrong logits
        self.model = load_model(folder).requires_grad_(False)
        quantize_(self.model, Int8DynamicActivationInt8WeightConfig(),  # the head takes 3 ms in oneDNN's reference
                  lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
        self.size = stored_size(self.model.state_dict())
        compiled = torch.compile(self.model.forward)

        def forward(idx: Tensor, targets: None = None, cache: KVCache | None = None) -> tuple[Tensor, None]:
            torch._dynamo.mark_static(idx)  # a kernel for each length of the prompt, and one for a token
            return compiled(idx, targets, cache)

        self.model.forward = forward


class Transformers(Engine):
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


# ---------------------------------------------------------------- engines with formats of their own

class LlamaCpp(Engine):
    package = "llama-cpp-python"

    def __init__(self, folder: Path, threads: int) -> None:
        from llama_cpp import Llama

        path = self.file(folder)
        block = load_model(folder).config.block_size
        self.llama, self.size = Llama(str(path), n_ctx=block, n_threads=threads, n_threads_batch=threads,
                                      flash_attn=True, verbose=False), path.stat().st_size

    def file(self, folder: Path) -> Path:
        from lib.gguf import write_gguf

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
    """llama-quantize's own Q4_0, from the Q8_0 file: embedding and head keep more bits."""

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


class OnnxRuntime(Engine):
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


class OpenVINO(Engine):
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
            if type(module) in (nn.Linear, nn.Embedding):
                model.set_submodule(name, Compressed(module))
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
    "owlet": Owlet, "torch.ao": TorchAO, "torchao-compiled": TorchAOCompiled,
    "transformers-fp32": Transformers, "llama.cpp-Q8_0": LlamaCpp, "llama.cpp-Q4_0": LlamaCppQ4,
    "CTranslate2": CTranslate2, "OpenVINO": OpenVINO, "ONNX-Runtime": OnnxRuntime,
}
