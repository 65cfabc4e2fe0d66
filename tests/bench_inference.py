"""Inference timings, by pytest-benchmark:  python -m pytest tests/bench_inference.py

Prompt and decode of each model size, for fp32, torch.ao and owlet. Columns are in tokens a second
when read as OPS x tokens (in extra_info, and in the table printed at the end). Weights are random:
speed does not depend on them. Sizes: OWLET_BENCH_SIZES=tiny,small,seed (the default) or any others.
"""

import os

import pytest
import torch

import int8
import quantize
from model import GPT, generate
from train import SIZES, build_model

DECODED = 32
CONTENDERS = ["fp32", "torch.ao", "owlet"]
rows: dict[tuple[str, str], dict[str, float]] = {}


def contender(size: str, name: str) -> GPT:
    torch.manual_seed(0)
    model = build_model(SIZES[size], 256).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    if name == "fp32":
        return model
    if name == "torch.ao":
        return quantize.torch_ao(model)
    if int8.owlet_kernels is None:
        pytest.skip("the kernels are not built: python setup.py build_ext")
    return int8.quantize(model, "owlet")


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    print(f"\n\ntokens a second, {torch.get_num_threads()} threads, medians; in brackets: times fp32")
    for (size, phase), speeds in rows.items():
        cells = [f"{name} {speed:8,.0f} ({speed / speeds['fp32']:.2f})" if "fp32" in speeds else f"{name} {speed:8,.0f}"
                 for name, speed in speeds.items()]
        print(f"{size:>6} {phase:>6}:  {'   '.join(cells)}")


@pytest.mark.parametrize("phase", ["prompt", "decode"])
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("size", os.environ.get("OWLET_BENCH_SIZES", "tiny,small,seed").split(","))
def bench_inference(benchmark, size, name, phase):
    model = contender(size, name)
    benchmark.group = f"{size} {phase}"
    if phase == "prompt":
        tokens = min(256, model.config.block_size)
        idx = torch.randint(0, 256, (1, tokens))
        benchmark.pedantic(lambda: list(generate(model, idx, 1, temperature=0)), rounds=9, warmup_rounds=2)
    else:
        tokens = DECODED
        idx = torch.randint(0, 256, (1, 16))
        benchmark.pedantic(lambda stream: [next(stream) for _ in range(DECODED)], rounds=9, warmup_rounds=2,
                           setup=lambda: ((prefilled(model, idx),), {}))
    speed = tokens / benchmark.stats.stats.median
    benchmark.extra_info["tokens_per_second"] = speed
    rows.setdefault((size, phase), {})[name] = speed


def prefilled(model: GPT, idx: torch.Tensor):
    """A generation that has read its prompt, so that what is timed next is decoding alone."""
    stream = generate(model, idx, DECODED + 1, temperature=0)
    next(stream)
    return stream
