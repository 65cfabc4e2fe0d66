"""Train a GPT on prepared tokens, in one process or under torchrun.

    python train.py                                  tiny, on the newest folder under data/
    python train.py small --data data/mybook --max-steps 3000
    torchrun --nproc_per_node=4 train.py             data parallel: gloo on CPUs, nccl on GPUs
    torchrun ... train.py --parallel fsdp            each rank holds a part of the model only
    python train.py --resume                         go on where the newest run stopped

What happens at a step depends only on (seed, step), never on what ran before in this process:
a resumed run repeats the uninterrupted one (on a CPU bit for bit), and every world size sees the same batches.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from tqdm import tqdm

from checkpoint import Background, atomic_path, by_age, copy_tokenizer, lock, read_json, read_last_state, write_state
from cli import UserError, parse, run
from model import GPT, GPTConfig, gpu_has_bf16, pick_device, write_pretrained
from muon import Muon, whole

Size = Literal["tiny", "small", "seed", "medium"]


@dataclass
class TrainConfig:
    size: Annotated[Size, tyro.conf.Positional] = "tiny"
    """Sets the defaults below: tiny 0.9M, small 11M, seed 26M, medium 85M parameters."""
    data: Path | None = None
    """Folder made by data/prepare.py; default: the newest under data/."""
    out: Path | None = None
    """Folder to write; default: a new out/DATA-SIZE. With --resume default: the newest under out/."""
    resume: bool = False
    """Continue the run in --out; flags given here replace its own."""
    init_from: Path | None = None
    """Fine-tune this checkpoint folder (owlet's, or a Qwen3 or Llama one); sets the architecture."""

    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None
    """Key/value heads for grouped-query attention; default: n_head."""
    n_embd: int = 128
    block_size: int = 128
    """Context length in tokens."""
    qk_norm: bool = True
    """RMSNorm on queries and keys: a Qwen3 model. False: a Llama model."""
    tie_embeddings: bool = True
    """One matrix for embedding and head."""
    dropout: float = 0.0

    max_steps: int = 2000
    batch_size: int = 16
    """Sequences a step, over all ranks together."""
    grad_accum: int = 1
    """Parts a rank's share of the batch is worked through in, to save memory; the result is the same."""
    muon_lr: float = 0.02
    """Learning rate of Muon, for the hidden matrices."""
    adam_lr: float = 3e-3
    """Learning rate of AdamW, for embedding, head and norms."""
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    warmup_steps: int = 0
    decay_share: float = 0.7
    """Last part of the run over which the learning rates fall linearly to zero."""

    eval_every: int = 250
    """Steps between evaluations; each also saves a checkpoint."""
    eval_tokens: int = 100_000
    """Validation tokens an evaluation looks at, always the same, spread evenly."""
    seed: int = 1337
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products (weights stay fp32); auto: bfloat16 where the hardware is fast at it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the blocks, which takes some 10 seconds; auto: if it is for 1000 steps or more."""
    threads: int | None = None
    """CPU threads of each rank; default: cores / ranks on this machine."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several ranks: ddp, each has the whole model; fsdp, each has a part of it, for models that one cannot hold."""


SIZES = {
    "tiny": TrainConfig(),
    "small": TrainConfig(size="small", n_layer=6, n_head=6, n_embd=384, block_size=256, max_steps=3000,
                         muon_lr=0.01, adam_lr=1.5e-3),
    "seed": TrainConfig(size="seed", n_layer=8, n_head=8, n_embd=512, block_size=512, max_steps=5000),
    "medium": TrainConfig(size="medium", n_layer=12, n_head=12, n_embd=768, block_size=1024, max_steps=10_000),
}


# What a resumed run cannot change. The flags of a new model are named as GPTConfig's fields.
ARCHITECTURE = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "qk_norm", "tie_embeddings", "dropout")


def read_flags(args: list[str]) -> tuple[TrainConfig, dict | None]:
    """Flags over the size's defaults; or (--resume) over the run's own settings, and its saved state."""
    description = "Train a GPT on prepared tokens, in one process or under torchrun."
    first = parse(TrainConfig, description, [a for a in args if a not in ("-h", "--help")])

    def note(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {text}", file=sys.stderr)

    out = folder_before_restart(first.out)
    if out is not None:
        note(f"going on in {out}, where this launch of torchrun ({launch()}) trained before")
    if out is None and not first.resume:
        return parse(TrainConfig, description, args, SIZES[first.size]), None
    if out is not None and not (out / "train_state.pt").exists():
        return dataclasses.replace(parse(TrainConfig, description, args, SIZES[first.size]), out=out), None
    out = out or first.out or by_age(Path("out"), "train_state.pt", "python train.py")[0]
    state, damage = read_last_state(out)
    if damage:
        note(damage)
    saved = TrainConfig(**state["config"] | {"out": out, "data": Path(state["config"]["data"]), "resume": False})
    config = parse(TrainConfig, description, args, saved)
    for name in ("size", "eval_tokens", *ARCHITECTURE):  # losses of other tokens could not be compared
        if getattr(config, name) != getattr(saved, name):
            raise UserError(f"--resume: {name} is {getattr(saved, name)} in {out}, expected the same, "
                            f"got {getattr(config, name)}")
    return config, state


def folder_before_restart(out: Path | None) -> Path | None:
    """The folder in which this launch of torchrun trained before it started its ranks anew; None if there is none.

    Each folder's .lock names the last launch that trained there. The newest folder would be a guess: a rank
    that died before it made its own would go on with another run's.
    """
    if launch() in ("", "none"):  # no torchrun, or several machines without --rdzv-id
        return None
    locks = [out / ".lock"] if out is not None else Path("out").glob("*/.lock")
    return next((path.parent for path in locks if path.exists() and path.read_text() == launch()), None)


def launch() -> str:
    """A name for this launch of torchrun, the same on every rank and after every restart; empty without torchrun."""
    if os.environ.get("GROUP_WORLD_SIZE") == "1" and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # RUN/attempt_N/RANK/error.json, where RUN is a new directory for each launch, even of a name given anew
        return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[2].name
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


# ---------------------------------------------------------------- processes

class Ranks:
    """Who this process is among those torchrun started (alone: rank 0 of 1), and its device."""

    def __init__(self, device: str, threads: int | None) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.world > 1 and self.device.type == "mps":  # has no process group
            self.device = torch.device("cpu")
        if self.device.type == "cuda":
            if self.world > 1:
                self.device = pick_device(f"cuda:{local_rank}")
            torch.cuda.set_device(self.device)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // local_world))
        if self.world > 1:
            store = next(dist.rendezvous("env://"))[0]
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun's store outlives the ranks: those of a restart must not find the addresses of those
                # before. (Several machines count their restarts apart, and need torchrun itself to see to it.)
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                    world_size=self.world)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum over ranks, in float64. (gloo has no average.)"""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_values(self, value: object) -> list:
        """Every rank's value, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------- data

def read_meta(folder: Path) -> dict:
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder}: expected a folder made by data/prepare.py, found no meta.json in it")
    return read_json(folder / "meta.json")


class TokenData:
    """train.bin and val.bin of a prepared folder, of which no more is read than is asked for. (Nor mapped into
    memory: pages once touched would stay, until a long run holds all of the file.)
    """

    def __init__(self, folder: Path, block_size: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.folder, self.meta = folder, read_meta(folder)
        self.block_size, self.device, self.seed = block_size, torch.device(device), seed
        self.files, self.tokens, self.dtype = {}, {}, np.dtype(self.meta["dtype"])
        for split in ("train", "val"):
            path, tokens = folder / f"{split}.bin", self.meta[split]["tokens"]
            if not path.exists() or path.stat().st_size != tokens * self.dtype.itemsize:
                raise UserError(f"{path}: expected {tokens} tokens as meta.json says; run data/prepare.py again")
            if tokens <= block_size:
                raise UserError(f"{path}: a block of {block_size} is longer than this text of {tokens} tokens; "
                                f"expected a --block-size of at most {tokens - 1}")
            self.files[split], self.tokens[split] = path.open("rb", buffering=0), tokens
        self.bits_per_nat = self.meta["val"]["tokens"] / self.meta["val"]["bytes"] / math.log(2)
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def sequences(self, split: str, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the sequences at `starts`, each (len(starts), block_size) int64."""
        file, block = self.files[split], np.empty((len(starts), self.block_size + 1), self.dtype)
        for row, start in zip(block, starts, strict=True):
            file.seek(int(start) * self.dtype.itemsize)
            file.readinto(row)
        block = torch.from_numpy(block.astype(np.int64))
        if self.device.type == "cuda":
            block = block.pin_memory()
        block = block.to(self.device, non_blocking=True)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def training_start(self, index: int) -> int:
        """Where training sequence `index` begins: every epoch has its own shift and permutation."""
        tokens, T = self.tokens["train"], self.block_size
        per_epoch = max(1, (tokens - T) // T)
        epoch, i = divmod(index, per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shift = rng.integers(0, min(T, tokens - per_epoch * T))
            self.epoch, self.order = epoch, shift + T * rng.permutation(per_epoch)
        return self.order[i]

    def batch(self, first: int, count: int, parts: int) -> list[tuple[Tensor, Tensor]]:
        """Training sequences first, first + 1, ... (`count` of them), in equal parts."""
        starts = np.array([self.training_start(index) for index in range(first, first + count)])
        return [self.sequences("train", part) for part in np.split(starts, parts)]

    def validation_starts(self, limit: int | None = None) -> np.ndarray:
        """Sequences that cover the validation text once, or `limit` tokens of it, evenly spread."""
        T = self.block_size
        starts = np.arange(0, self.tokens["val"] - T, T)
        if limit is not None and limit < len(starts) * T:
            starts = starts[np.linspace(0, len(starts) - 1, max(1, limit // T)).astype(int)]
        return starts


# ---------------------------------------------------------------- optimisation

def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    in_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_muon]
    dtype = pick_dtype(config.dtype, model.device, 256)  # Muon's products are in it from end to end
    return [Muon(matrices, lr=config.muon_lr, momentum=0.85, dtype=dtype),
            torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def lr_scale(step: int, config: TrainConfig) -> float:
    """Trapezoid (Zhai et al., 2022): up over warmup_steps, flat, down to zero over decay_share."""
    up = (step + 1) / max(1, config.warmup_steps)
    down = (config.max_steps - step) / max(1.0, config.decay_share * config.max_steps)
    return min(1.0, up, down)


def forward_loss(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean loss in nats a token; matrix products in dtype, weights and everything delicate in fp32."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return model(x, y)[1]


def update(model: GPT, optimizers: list[torch.optim.Optimizer], step: int, config: TrainConfig) -> None:
    """Clip the gradients, set this step's rates, take the step."""
    if config.grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    muon, adam = optimizers
    for group in muon.param_groups:
        group["lr"] = config.muon_lr * lr_scale(step, config)
        group["weight_decay"] = config.weight_decay
    for group in adam.param_groups:
        group["lr"] = config.adam_lr * lr_scale(step, config)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(model: nn.Module, data: TokenData, limit: int | None = None, ranks: Ranks | None = None,
             dtype: torch.dtype = torch.float32) -> float:
    """Mean validation loss in nats a token; the ranks share the sequences among them."""
    starts = data.validation_starts(limit)
    # as many sequences at a time as keep their logits, in fp32, below 128 MB
    batch = max(1, min(8192, 2**25 // data.meta["vocab_size"]) // data.block_size)
    rank, world = (ranks.rank, ranks.world) if ranks is not None else (0, 1)
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.compiler.set_stance("force_eager"):  # not worth compiling for other shapes
        for i in range(0, len(starts), batch * world):
            mine = starts[i:i + batch * world][rank::world]
            # where sequences run out, any will do: ranks that share a model go through it together
            x, y = data.sequences("val", mine if len(mine) else starts[:1])
            total += forward_loss(model, x, y, dtype).item() * len(mine)
    model.train(was_training)
    return (ranks.sum(total)[0] if ranks is not None else total) / len(starts)


def pick_dtype(name: str, device: torch.device, width: int) -> torch.dtype:
    """auto: bfloat16 where it is fast, for matrices at least this wide."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if gpu_has_bf16(device) else torch.float32
    # On a CPU bf16 pays with AMX tiles only (AVX512-BF16 alone runs at half the speed of fp32), and, where
    # fp32 has to be converted for each product, only if that is wide enough to outweigh the conversions.
    amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if amx and width >= 256 else torch.float32


def can_compile(device: torch.device) -> bool:
    """Whether there is what torch.compile generates code with."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What this device reaches on a large matrix product (FLOP/s), measured: best of twenty."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for an asynchronous device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ---------------------------------------------------------------- what a run leaves behind

class RunLog:
    """log.jsonl, TensorBoard events under runs/, and loss.png."""

    def __init__(self, folder: Path, step: int, bits_per_nat: float, title: str) -> None:
        from matplotlib.figure import Figure  # now, and not with the first picture: memory stays as it is from here on
        from torch.utils.tensorboard import SummaryWriter

        self.new_figure = partial(Figure, figsize=(8, 4.5), layout="constrained")
        self.path, self.bits_per_nat = folder / "log.jsonl", bits_per_nat
        self.title = title
        self.records = []  # the resumed run's past
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):  # a line that a killed run left half-written
                self.records += [record for record in [json.loads(line)] if record["step"] <= step]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self.board = SummaryWriter(folder / "runs", purge_step=step)

    def add(self, **record: float) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(name, value, record["step"])
        self.board.flush()

    def curve(self, width: int = 40) -> str:
        """The validation losses as a line of text: ▇▅▃▂▁."""
        values = [r["val_loss"] for r in self.records if "val_loss" in r][-width:]
        low, high = min(values), max(values)
        return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)

    def draw(self) -> None:
        figure = self.new_figure()
        axes = figure.subplots()
        for name, style in {"train": {"color": "#9ecae1", "lw": 1},
                            "val": {"color": "#08519c", "marker": "o", "ms": 4}}.items():
            points = [(r["step"], r[f"{name}_loss"] * self.bits_per_nat) for r in self.records if f"{name}_loss" in r]
            if points:
                axes.plot(*zip(*points, strict=True), label=f"{name} ({points[-1][1]:.3f})", **style)
        axes.set(title=self.title, xlabel="step", ylabel="bits per byte")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_path(self.path.with_name("loss.png")) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def snapshot(model: GPT, optimizers: list[torch.optim.Optimizer], ranks: Ranks) -> dict:
    """What training has made so far, on rank 0's CPU. All ranks must call this: each may have a part of it."""

    def take(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        x = whole(x)
        return x.to("cpu", copy=True) if ranks.is_main else None  # so that training may go on while this is saved

    weights = model.state_dict()
    if model.config.tie_embeddings:  # one matrix, copied once
        del weights["lm_head.weight"]
    state = tree_map(take, {"model": dict(weights), "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    if model.config.tie_embeddings:
        state["model"]["lm_head.weight"] = state["model"]["model.embed_tokens.weight"]
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """optimizer.load_state_dict, of which each rank takes its part where parameters are sharded."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def part(x: Tensor, p: Tensor) -> Tensor:
        sharded = isinstance(p, DTensor) and x.shape == p.shape
        return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if sharded else x

    state = {i: {name: part(x, params[i]) for name, x in tensors.items()} for i, tensors in saved["state"].items()}
    optimizer.load_state_dict(saved | {"state": state})


def save_checkpoint(out: Path, trained: dict, better: bool, step: int, best: float, config: TrainConfig,
                    model_config: GPTConfig, data: TokenData, log: RunLog) -> None:
    """train_state.pt holds all a resume needs in one atomic file: it can never be half of two steps.

    model.safetensors goes before it: after a kill between the two, a resume comes by the same model again. But for
    the first: a resume then has it from the state, while a model alone could not be resumed. Runs of the same
    settings leave the same bytes, so the state does not hold where it lies, or how often it was resumed.
    """
    # by NumPy: a second thread that had torch compute in parallel would have OpenMP threads of its own, and with more
    # of them than cores every wait of the training's becomes three times as long, to the end of the run
    if not all(np.isfinite(weight.numpy()).all() for weight in trained["model"].values()):
        raise diverged(config, step, "a weight is not finite")
    first = not holds_model(out)
    if better and not first:
        write_pretrained(out, trained["model"], model_config)  # the best model so far, not the latest
    plain = {name: str(value.resolve()) if isinstance(value, Path) else value
             for name, value in vars(config).items() if name not in ("out", "resume")}
    write_state(out / "train_state.pt", {
        "step": step, "best": best, "config": plain, "model_config": dataclasses.asdict(model_config),
        "data_sha256": data.meta["train"]["sha256"], **trained})
    if first:
        write_pretrained(out, trained["model"], model_config)
    log.draw()


def holds_model(out: Path) -> bool:
    return (out / "config.json").exists()  # which is written last


def diverged(config: TrainConfig, step: int, what: str) -> UserError:
    left = "keeps its last checkpoint" if holds_model(config.out) else "has no checkpoint yet"
    return UserError(f"step {step}: {what}; {config.out} {left}. Try lower --muon-lr and "
                     f"--adam-lr (now {config.muon_lr:g} and {config.adam_lr:g})")


# ---------------------------------------------------------------- the run

def new_folder(config: TrainConfig, data: Path) -> Path:
    """--out, which must hold no model yet, or the first free out/DATA-SIZE, out/DATA-SIZE-2, ..."""
    if config.out is not None:
        if (config.out / "train_state.pt").exists():
            raise UserError(f"{config.out}: holds a run already; --resume continues it, another --out starts afresh")
        if any(config.out.glob("*.safetensors")):
            raise UserError(f"{config.out}: holds a model already; name another --out")
        return config.out
    stem, number = Path("out") / f"{data.name}-{config.size}", 1
    while (folder := stem if number == 1 else stem.with_name(f"{stem.name}-{number}")).exists():
        number += 1
    return folder


def build_model(config: TrainConfig, vocab_size: int) -> GPT:
    """A new model as the flags say, or the one to fine-tune."""
    if config.init_from is None:
        return GPT(GPTConfig(vocab_size, **{name: getattr(config, name) for name in ARCHITECTURE}))
    model = GPT.from_pretrained(config.init_from, config.dropout)
    if model.config.vocab_size < vocab_size:
        raise UserError(f"--init-from: the model knows {model.config.vocab_size} tokens, the data has {vocab_size}; "
                        f"prepare the data with --tokenizer {config.init_from}")
    config.block_size = min(config.block_size, model.config.block_size)
    return model


def spread(model: GPT, config: TrainConfig, ranks: Ranks, dtype: torch.dtype) -> nn.Module:
    """The model, on its device, as this rank is to call it. With fsdp its parameters become this rank's parts of them.
    """
    if config.compile == "on":
        for block in model.model.layers:  # all have the same code, which is compiled once
            block.forward = torch.compile(block.forward)
    if ranks.world == 1:
        return model.to(ranks.device)
    if config.parallel == "fsdp":  # Zhao et al., 2023; one block at a time is whole on the device
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        # gathered in dtype; autocast alone would keep its copy of every block from forward to backward
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh)
    model.to(ranks.device)
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, forward_sync_buffers=False,
                                   gradient_as_bucket_view=True)


def check(config: TrainConfig, world: int) -> None:
    parts = world * config.grad_accum
    least = {"max_steps": 1, "batch_size": 1, "grad_accum": 1, "block_size": 1, "eval_every": 1, "eval_tokens": 1,
             "threads": 1, "muon_lr": 0, "adam_lr": 0, "weight_decay": 0, "grad_clip": 0, "warmup_steps": 0,
             "decay_share": 0, "seed": 0}
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected {low} or more, got {value}")
    if config.threads is not None and config.threads > 4096:
        raise UserError(f"--threads: expected 4096 or less, got {config.threads}")
    if config.batch_size % parts:
        raise UserError(f"--batch-size: expected a multiple of ranks x grad-accum = {parts}, got {config.batch_size}")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def train(config: TrainConfig, ranks: Ranks, state: dict | None = None) -> int:
    """Train, from a saved state or from the start. Returns the process's exit code: 0, or
    128 + the signal that asked for a stop.
    """
    with contextlib.ExitStack() as at_exit:
        return _train(config, ranks, state, at_exit)


def _train(config: TrainConfig, ranks: Ranks, state: dict | None, at_exit: contextlib.ExitStack) -> int:
    """`train`, which puts into at_exit what must be done however it ends."""
    # where from, where to
    check(config, ranks.world)
    found = ranks.all_values((f"step {state['step']} of {config.out}", state["sha256"]) if state else ("nothing", ""))
    if len(set(found)) > 1:
        raise UserError("the ranks found different states to go on from, rank by rank: "
                        f"{', '.join(name for name, _ in found)}; expected the same on every machine")
    if state is not None and ranks.is_main and not holds_model(config.out):
        with lock(config.out, launch()):  # killed in its first save
            write_pretrained(config.out, state["model"], GPTConfig(**state["model_config"]))
    if state is not None and state["step"] >= config.max_steps:
        if ranks.is_main:
            print(f"{config.out} is trained for {state['step']} steps already; raise --max-steps to go on")
        return 0
    config.data = config.data or by_age(Path("data"), "meta.json", "python data/prepare.py")[0]
    out = config.out = ranks.all_values(config.out if state else new_folder(config, config.data))[0]
    say = tqdm.write if ranks.is_main else lambda text: None

    # model and data
    torch.manual_seed(config.seed)
    if state is None:
        model = build_model(config, read_meta(config.data)["vocab_size"])
    else:
        model = GPT(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    data = TokenData(config.data, config.block_size, ranks.device, config.seed)
    if state is not None and state["data_sha256"] != data.meta["train"]["sha256"]:
        raise UserError(f"--resume: {out} was trained on other data than {config.data} now holds")
    share = config.batch_size // ranks.world  # of each step's sequences
    if config.compile == "auto":  # settled here for resumed runs too: they are to have the same arithmetic
        config.compile = "on" if config.max_steps >= 1000 and can_compile(ranks.device) else "off"
    dtype = pick_dtype(config.dtype, ranks.device, model.config.n_embd)
    wrapped = spread(model, config, ranks, dtype).train()
    optimizers = make_optimizers(model, config)
    first, best = 0, math.inf
    if state is not None:
        first, best = state["step"], state["best"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        state.clear()  # all of it has its place now

    # log
    peak = peak_flops(ranks.device, dtype) * ranks.world
    tokens_a_step = config.batch_size * config.block_size
    saves = Background()
    if ranks.is_main:
        at_exit.enter_context(lock(out, launch()))
        copy_tokenizer(config.data, out)
    title = f"{out.name}: {model.num_params() / 1e6:.1f}M parameters on {config.data.name}"
    log = RunLog(out, first, data.bits_per_nat, title) if ranks.is_main else None
    say(f"{out}: {config.size}, {model.num_params() / 1e6:.2f}M parameters, {config.data.name} "
        f"({data.tokens['train']:,} tokens), steps {first} to {config.max_steps} of {tokens_a_step:,} tokens\n"
        f"{ranks.world} x {ranks.device.type}, {torch.get_num_threads()} threads each, "
        f"{str(dtype).removeprefix('torch.')}, matmul peak {peak / 1e9:,.0f} GFLOP/s"
        f"{'; compiling first, some 10 seconds' if config.compile == 'on' else ''}")

    # a signal asks for a stop; the loop obeys between two steps, where the state is whole
    asked: list[tuple[int, float]] = []  # signal, when

    def ask(number: int, frame: object) -> None:
        # a second Ctrl-C means at once; but torchrun and schedulers may send a signal twice in a row
        if asked and number == signal.SIGINT and time.monotonic() - asked[0][1] > 1:
            raise KeyboardInterrupt
        if not asked:
            say(f"{signal.Signals(number).name}: finishing this step and saving (Ctrl-C again: stop at once)")
        asked.append((number, time.monotonic()))

    for number in (signal.SIGINT, signal.SIGTERM):
        at_exit.callback(signal.signal, number, signal.signal(number, ask))
    at_exit.callback(saves.wait)  # before signals kill again: torchrun sends one as soon as another rank has died

    bar = tqdm(total=config.max_steps, initial=first, unit="step", dynamic_ncols=True,
               disable=None if ranks.is_main else True)
    running, reported, began = torch.zeros((), device=ranks.device), first, time.perf_counter()
    spoke, pace, slow = began, 0.0, False
    for step in range(first, config.max_steps):
        if model.config.dropout:  # drawn anew from (seed, step, rank): a resume repeats it
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, ranks.rank]).generate_state(1)[0]))
        parts = data.batch(step * config.batch_size + ranks.rank * share, share, config.grad_accum)
        for i, (x, y) in enumerate(parts):
            exchange = i == len(parts) - 1  # gradients are summed over the ranks once they are whole
            if isinstance(wrapped, FSDPModule):
                wrapped.set_requires_gradient_sync(exchange)
            hold = isinstance(wrapped, DistributedDataParallel) and not exchange
            with wrapped.no_sync() if hold else contextlib.nullcontext():
                loss = forward_loss(wrapped, x, y, dtype) / len(parts)
                loss.backward()
            running += loss.detach()
        update(model, optimizers, step, config)
        bar.update()
        done = step + 1

        last, due = done == config.max_steps, done % config.eval_every == 0
        stop = bool(asked)
        if done % 10 == 0 or slow or last or due or (stop and ranks.world == 1):
            # ranks talk here only, so they also agree here on whether to stop
            total, stops, seconds = ranks.sum(running.item(), float(stop), time.perf_counter() - began)
            stop, seconds = stops > 0, seconds / ranks.world
            train_loss = total / ranks.world / (done - reported)
            pace = tokens_a_step * (done - reported) / seconds
            slow = seconds / (done - reported) > 1
            if not math.isfinite(train_loss):
                raise diverged(config, done, f"the loss is {train_loss}")
            left = duration((config.max_steps - done) * tokens_a_step / pace)
            speed = f"{pace:,.0f} tokens/s ({model.estimate_mfu(pace, peak):.0%} of peak), {left} left"
            if log:
                log.add(step=done, train_loss=train_loss, lr_scale=lr_scale(step, config), tokens_per_second=pace)
                bar.set_postfix_str(f"loss {train_loss:.3f}, {pace:,.0f} tokens/s", refresh=False)
                if bar.disable and time.perf_counter() - spoke > 20 and not (last or due):
                    spoke = time.perf_counter()
                    say(f"step {done}/{config.max_steps}: train {train_loss:.3f} nats = "
                        f"{train_loss * data.bits_per_nat:.3f} bits/byte, {speed}")
            running.zero_()
            reported, began = done, time.perf_counter()
        else:
            stop = False

        if due or last:
            val_loss = evaluate(model, data, config.eval_tokens, ranks, dtype)
            if not math.isfinite(val_loss):
                raise diverged(config, done, f"the validation loss is {val_loss}")
            better, best = val_loss < best, min(best, val_loss)
            if ranks.is_main:
                log.add(step=done, val_loss=val_loss, val_bits_per_byte=val_loss * data.bits_per_nat)
                say(f"step {done}/{config.max_steps}: train {train_loss:.3f}, validation {val_loss:.4f} nats = "
                    f"{val_loss * data.bits_per_nat:.4f} bits/byte{'' if better else ' (no better)'}, {speed}")
        if due or last or stop:
            trained = snapshot(model, optimizers, ranks)
            if ranks.is_main:
                better = (due or last) and better
                saves.start(save_checkpoint, out, trained, better, done, best, config, model.config, data, log)
        began = time.perf_counter() if due or last else began
        if stop:
            break

    bar.close()
    saves.wait()
    if log:
        log.board.close()
    if done < config.max_steps:
        say(f"stopped at step {done}; go on with: python train.py --resume --out {out}")
        return 128 + (asked[0][0] if asked else signal.SIGTERM)
    if log:
        say(f"{out}: best validation {best:.4f} nats, {best * data.bits_per_nat:.4f} bits/byte\n"
            f"{log.curve()} the whole curve: {out / 'loss.png'}\nnext: python sample.py --checkpoint {out}")
    return 0


def main() -> None:
    config, state = read_flags(sys.argv[1:])
    ranks = Ranks(config.device, config.threads)
    try:
        code = train(config, ranks, state)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        sys.exit(f"train.py: rank {ranks.rank} lost another rank; --resume continues from the last checkpoint")
    ranks.close()
    sys.exit(code)


if __name__ == "__main__":
    run(main)
