"""What a training step costs: train.py's step beside a plain loop over the same model.

    python tests/bench/bench_train.py                        small, on 2 threads
    python tests/bench/bench_train.py --sizes tiny small --threads 1 --rounds 9
    python tests/bench/bench_train.py --sizes medium         on a GPU, if there is one

plain is PyTorch as it comes: fp32 (on a GPU bf16, by autocast), eager, AdamW for all parameters. plain Muon has
torch.optim.Muon for the matrices that train.py has Muon for. On a GPU, plain compiled is nanoGPT's loop over the same
model: torch.compile of the whole, fused AdamW. owlet is the step of a long run of train.py: compiled, in the dtype that
suits the machine. owlet float32 is the same in fp32. The peak is what a large matrix product reaches in that dtype. It
is measured in the same run, in turn with the steps.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from report import machine_name, publish, take_turns
from torch import Tensor, nn

from dataloader import forward_loss
from lib.cli import Count, Threads, flag, parse, run
from lib.distributed import Ranks, parallelize
from lib.machine import can_compile, compile_blocks, peak_flops, pick_dtype
from lib.muon import make_optimizers, update
from model import GPT, SIZES, GPTConfig

BATCH = 32 if torch.cuda.is_available() else 16
VOCABULARY = 256
RATES = 0.02, 3e-3  # learning rates of Muon and AdamW: the time of a step does not depend on them

Step = Callable[[Tensor, Tensor], None]  # trains a model on x, y (B, T)


def new_model(size: str) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCABULARY, **SIZES[size])).train()


def owlet_step(size: str, ranks: Ranks, name: Literal["auto", "float32"]) -> Step:
    model = new_model(size)
    dtype = pick_dtype(name, ranks.device)
    wrapped = parallelize(model, ranks, dtype=dtype)
    if can_compile(ranks.device):
        compile_blocks(model.model.layers)
    optimizers = make_optimizers(model, RATES[0], dtype)

    def step(x: Tensor, y: Tensor) -> None:
        forward_loss(wrapped, x, y, dtype).backward()
        update(model, optimizers, RATES)

    return step


def plain_step(size: str, ranks: Ranks, dtype: torch.dtype, muon: bool = False, compile: bool = False) -> Step:
    model = new_model(size).to(ranks.device)
    optimizers = [torch.optim.AdamW(model.parameters(), fused=compile)]
    called = torch.compile(model) if compile else model
    if muon:
        matrices, others = (optimizer.params for optimizer in make_optimizers(model, RATES[0], dtype))
        optimizers = [torch.optim.Muon(matrices), torch.optim.AdamW(others)]

    def step(x: Tensor, y: Tensor) -> None:
        forward_loss(called, x, y, dtype).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def seconds(step: Step, x: Tensor, y: Tensor) -> float:
    start = time.perf_counter()
    step(x, y)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size: str, ranks: Ranks, rounds: int) -> list[dict]:
    """A row for each way to take a step."""
    device, block = ranks.device, SIZES[size]["block_size"]
    auto, on_gpu = pick_dtype("auto", device), device.type == "cuda"
    plain = auto if on_gpu else torch.float32
    steps = {"plain": (plain, plain_step(size, ranks, plain)),
             "plain Muon": (plain, plain_step(size, ranks, plain, muon=True)),
             "owlet float32": (torch.float32, owlet_step(size, ranks, "float32")),
             "owlet": (auto, owlet_step(size, ranks, "auto"))}
    if on_gpu:
        steps["plain compiled"] = plain, plain_step(size, ranks, plain, compile=True)
    x, y = torch.randint(VOCABULARY, (2, BATCH, block), device=device)
    calls = {name: partial(seconds, step, x, y) for name, (_, step) in steps.items()}
    calls |= {dtype: partial(peak_flops, device, dtype) for dtype in (torch.float32, auto)}
    found = take_turns(calls, rounds, warmup=2, title=size)
    rows = []
    for name, (dtype, _) in steps.items():
        speed, peak = BATCH * block / statistics.median(found[name]), max(found[dtype])
        rows.append({"size": size, "step": name, "dtype": str(dtype).removeprefix("torch."), "speed": speed,
                     "ratio": statistics.median(a / b for a, b in zip(found["plain"], found[name], strict=True)),
                     "mfu": new_model(size).estimate_mfu(speed, peak), "peak": peak / 1e9})
    return rows


@dataclass
class TrainBenchConfig:
    sizes: tuple[Literal["tiny", "small", "base", "medium"], ...] = flag(("small",), "Models to train.")
    threads: Threads = flag(2, "CPU threads.")
    rounds: Count = flag(7, "Steps of each that count; two more are the warm-up.")
    out: Path = flag(Path("out/train"), "Folder for train.md and train.json.")


def main() -> None:
    flags = parse(TrainBenchConfig, "What a training step costs: train.py's step beside a plain loop.")
    ranks = Ranks("auto", flags.threads)
    rows = [row for size in flags.sizes for row in measure(size, ranks, flags.rounds)]
    note = (f"{machine_name(ranks.device.type == 'cuda')}, {flags.threads} threads; "
            f"medians of {flags.rounds} steps in turn")
    publish(flags.out / "train", note, (rows, {
        "size": "{size}", "step": "{step}", "dtype": "{dtype}", "tokens/s": "{speed:,.0f}",
        "over plain": "{ratio:.2f}x", "of matmul peak": "{mfu:.0%}", "peak, GFLOP/s": "{peak:,.0f}"}))


if __name__ == "__main__":
    run(main)
