"""What a training step costs: train.py's, beside a plain loop over the same model.

    python tests/bench/bench_train.py                        small, on 2 threads
    python tests/bench/bench_train.py --sizes tiny small --threads 1 --rounds 9
    python tests/bench/bench_train.py --sizes medium         on a GPU, if there is one

plain is PyTorch as it comes: fp32 (on a GPU bf16, by autocast), eager, AdamW for all parameters. plain Muon is the
same with torch.optim.Muon for the matrices that train.py has Muon for. owlet is the step of a long run of train.py
(compiled, in the dtype that suits the machine), owlet float32 the same in fp32. They take turns, so that a slow moment
of the machine is everybody's. The peak is what a large matrix product reaches in that dtype, measured in the same run.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from cli import UserError, parse, run
from dataloader import forward_loss
from distributed import Ranks, parallelize
from files import write_json
from machine import can_compile, cpu_name, peak_flops, pick_dtype
from model import GPT
from muon import make_optimizers, update
from train import TrainConfig, build_model, defaults

VOCABULARY = 256


Step = Callable[[Tensor, Tensor], None]  # trains a model by a batch


def owlet_step(config: TrainConfig, ranks: Ranks) -> Step:
    model = new_model(config, ranks)
    dtype = pick_dtype(config.dtype, ranks.device, config.n_embd)
    wrapped = parallelize(model, ranks, config.parallel, dtype, config.compile == "on")
    optimizers = optimizers_of(model, config)

    def step(x: Tensor, y: Tensor) -> None:
        forward_loss(wrapped, x, y, dtype).backward()
        update(model, optimizers, (config.muon_lr, config.adam_lr))

    return step


def plain_step(config: TrainConfig, ranks: Ranks, dtype: torch.dtype, muon: bool) -> Step:
    model = new_model(config, ranks)
    optimizers = [torch.optim.AdamW(model.parameters())]
    if muon:
        matrices, others = (optimizer.param_groups[0]["params"] for optimizer in optimizers_of(model, config))
        optimizers = [torch.optim.Muon(matrices), torch.optim.AdamW(others)]

    def step(x: Tensor, y: Tensor) -> None:
        forward_loss(model, x, y, dtype).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def optimizers_of(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    return make_optimizers(model, config.muon_lr, config.adam_lr, pick_dtype(config.dtype, model.device, 256))


def new_model(config: TrainConfig, ranks: Ranks) -> GPT:
    torch.manual_seed(0)
    return build_model(config, VOCABULARY).to(ranks.device).train()


@dataclass
class TrainBenchConfig:
    sizes: tuple[Literal["tiny", "small", "base", "medium"], ...] = ("small",)
    threads: int = 2
    rounds: int = 7
    """Steps of each that count; two more warm up."""
    out: Path = Path("out/train")
    """Folder for train.json."""


def main() -> None:
    flags = parse(TrainBenchConfig, "What a training step costs, beside a plain loop over the same model.")
    for name, value in (("threads", flags.threads), ("rounds", flags.rounds)):
        if value < 1:
            raise UserError(f"--{name}: expected 1 or more, got {value}")
    ranks, rows = Ranks("auto", flags.threads), []
    device = ranks.device
    for size in flags.sizes:
        config = replace(defaults(size), compile="on" if can_compile(device) else "off")
        dtype = pick_dtype("auto", device, config.n_embd)
        plain = dtype if device.type == "cuda" else torch.float32
        steps = {"plain": (plain_step(config, ranks, plain, muon=False), plain),
                 "plain Muon": (plain_step(config, ranks, plain, muon=True), plain),
                 "owlet float32": (owlet_step(replace(config, dtype="float32"), ranks), torch.float32),
                 "owlet": (owlet_step(config, ranks), dtype)}
        tokens = torch.randint(VOCABULARY, (2, config.batch_size, config.block_size), device=device)
        seconds, peaks = {name: [] for name in steps}, {torch.float32: 0.0, dtype: 0.0}
        for turn in tqdm(range(flags.rounds + 2), desc=size, disable=None, leave=False):
            for name, (step, _) in steps.items():
                seconds[name].append(timed(step, *tokens))
                seconds[name] = seconds[name][-max(1, turn - 1):]  # without those that warm up
            peaks = {kind: max(best, peak_flops(device, kind)) for kind, best in peaks.items()}
        for name, (_, kind) in steps.items():
            speed = tokens[0].numel() / statistics.median(seconds[name])
            ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds[name], strict=True))
            mfu = new_model(config, ranks).estimate_mfu(speed, peaks[kind])
            rows.append([size, name, str(kind).removeprefix("torch."), f"{speed:,.0f}", f"{ratio:.2f}x", f"{mfu:.0%}",
                         f"{peaks[kind] / 1e9:,.0f}"])
    header = ["size", "step", "dtype", "tokens/s", "over plain", "of matmul peak", "peak, GFLOP/s"]
    print("\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * 3 + ["--:"] * 4, *rows)))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {flags.threads} threads"
    print(f"{machine}, torch {torch.__version__}; medians of {flags.rounds} steps in turn")
    write_json(flags.out / "train.json", {"machine": machine, "header": header, "rows": rows})


def timed(step: Step, x: Tensor, y: Tensor) -> float:
    began = time.perf_counter()
    step(x, y)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    run(main)
