"""Train a GPT on prepared tokens, in one process or under torchrun.

    python train.py                                  tiny, on the newest folder under data/
    python train.py small --data mybook.txt --max-steps 3000
    python train.py --init-from out/SmolLM2-135M-Instruct --data mybook.txt
    torchrun --nproc_per_node=4 train.py             data parallel: gloo on CPUs, nccl on GPUs
    torchrun ... train.py --parallel fsdp            each rank holds a part of the model only
    python train.py --resume                         continue where the newest run stopped

The batch and the dropout of a step follow from (seed, step) alone: a resumed run repeats the uninterrupted one (on a
CPU with as many threads and ranks bit for bit), and every number of ranks sees the same batches.
"""

import contextlib
import dataclasses
import math
import os
import signal
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from msgspec import Meta
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoint import (
    STATE,
    TrainState,
    config_from_hf,
    copy_companions,
    empty_model,
    holds_model,
    holds_weights,
    load_model,
    load_tensors,
    read_config,
    read_state,
    read_tokenizer,
    save_weights,
    training_tensors,
    weights_of,
    write_tensors,
)
from cli import (
    Count,
    NonNegative,
    Seed,
    StopSignals,
    Threads,
    UserError,
    command,
    flag,
    given,
    note,
    one_line,
    optional,
    parse,
    refuse,
    run,
)
from corpus import prepared
from dataloader import TokenData, evaluate, forward_loss, read_meta, uncompiled
from distributed import Ranks, gather_to_main, launch, parallelize, restart_folder, sync_gradients
from fetch import model_folder
from files import lock, newest, read_json, write_json
from generate import generate
from machine import can_compile, compile_blocks, peak_flops, pick_dtype
from model import GPT, SIZES, GPTConfig
from muon import make_optimizers, update
from runlog import RunLog

DESCRIPTION = "Train a GPT on prepared tokens, in one process or under torchrun."


# ---------------------------------------------------------------- flags

Share = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True)
class TrainConfig:
    """What the user asks for. The defaults are tiny's (docs/log.md, "Training recipe"); SIZE_DEFAULTS has others'."""

    size: Literal["tiny", "small", "base", "medium"] = flag(
        "tiny", "Sets the defaults below: 0.9M, 11M, 26M or 85M parameters.", positional=True)
    data: Path | None = flag(None, "Folder made by data/prepare.py, or a text, to make one of; default: the newest.")
    out: Path | None = flag(None, "Folder to write; default: a new out/DATA-SIZE, with --resume the newest.")
    resume: bool = flag(False, "Continue the run in --out; flags given here replace its own.")
    init_from: Path | None = flag(None, "Model to fine-tune: a folder, or ORG/NAME of the Hugging Face hub.")

    n_layer: int = flag(4, "Blocks.")
    n_head: int = flag(4, "Attention heads of each block.")
    n_kv_head: int | None = flag(None, "Key/value heads for grouped-query attention; default: n_head.")
    n_embd: int = flag(128, "Width of the residual stream.")
    block_size: Count = flag(128, "Context length in tokens.")
    qk_norm: bool = flag(True, "RMSNorm on queries and keys: a Qwen3 model. Without: a Llama model.")
    tie_embeddings: bool | None = flag(None, "One matrix for embedding and head; default: with over 1,024 tokens.")
    dropout: Share | None = flag(None, "Share of each block's output to drop; default: 0 to 0.2, by text and run.")

    max_steps: Count | None = flag(None, "Steps of the whole run; default: by the size and the length of the text.")
    max_minutes: Annotated[float, Meta(ge=0.01, le=1e6)] | None = flag(
        None, "Minutes of the whole run, in place of --max-steps.")
    batch_size: Count = flag(16, "Sequences a step, over all ranks together.")
    grad_accum: Count | None = flag(1, "Parts of a rank's batch, in turn: same result, less memory; fine-tuning: all.")
    muon_lr: NonNegative = flag(0.02, "Learning rate of Muon, for the blocks' matrices; 0: AdamW takes them.")
    adam_lr: NonNegative = flag(1e-2, "Learning rate of AdamW, for embedding, head and norms.")
    weight_decay: NonNegative = flag(0.0, "Decoupled weight decay of Muon.")
    grad_clip: NonNegative = flag(1.0, "Largest gradient norm; 0: no clipping.")
    warmup_steps: Annotated[int, Meta(ge=0, le=10**12)] = flag(
        0, "First steps, over which the learning rates rise linearly.")
    warmdown: NonNegative = flag(0.7, "Last share of the run, over which the learning rates fall linearly to zero.")

    eval_every: Count | None = flag(None, "Steps between evaluations, which also save; default: 250, or 8 in all.")
    eval_tokens: Count = flag(100_000, "Validation tokens of an evaluation, always the same, evenly spread.")
    seed: Seed = flag(1337, "Draws the weights and the order of the data.")
    device: str = flag("auto", "auto, cpu, cuda or mps.")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "Of products; auto: bfloat16 where hardware has it.")
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile (10 seconds); auto: for 1000 steps or more.")
    threads: Threads | None = flag(None, "CPU threads of each rank; default: as many as cores are free.")
    parallel: Literal["ddp", "fsdp"] = flag("ddp", "Each rank has the whole model (ddp) or a part of it (fsdp).")


RATES = {"muon_lr": 0.01, "adam_lr": 1.5e-3}  # of small, and a guess for larger models
SIZE_DEFAULTS = {"tiny": {}, "small": RATES, "base": RATES, "medium": RATES}
# docs/log.md, "Fine-tuning". grad_accum None: parts_of() looks at the ranks.
FINE_TUNING = {"batch_size": 4, "grad_accum": None, "block_size": 512, "muon_lr": 0.0, "adam_lr": 1e-4,
               "warmup_steps": 5, "warmdown": 0.9, "dropout": 0.0}
FINE_TUNING_PASSES = 2
# Of a default run at most: steps, and passes through the text (docs/log.md, "Length of a run")
STEPS, PASSES = {"tiny": 2000, "small": 3000, "base": 5000, "medium": 10_000}, 8
# The flags that shape a new model have the names of GPTConfig's fields. A fine-tuned model has its own shape.
SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "qk_norm", "tie_embeddings")
# A resumed run cannot change these; losses over other tokens could not be compared.
FIXED = ("size", "init_from", "eval_tokens", *SHAPE, "block_size")


@dataclass(frozen=True)
class Plan:
    """What a run decides where its flags leave it open. A resumed run goes on with it.

    A field has the name of the flag that decides in its place.
    """

    data: Path  # the prepared folder
    out: Path
    block_size: Count  # no longer than the text, or than what the model to fine-tune takes
    max_steps: Count
    dropout: Share
    dtype: Literal["float32", "bfloat16"]
    compile: Literal["on", "off"]
    data_sha256: str


def defaults(size: str) -> TrainConfig:
    return TrainConfig(size=size, **SIZES[size], **SIZE_DEFAULTS[size])


def read_flags(args: list[str]) -> tuple[TrainConfig, Plan | None, TrainState | None]:
    """The flags over the defaults of the size, or over those of the run to go on with; its plan; its state."""
    without_help = [a for a in args if a not in ("-h", "--help")]
    first, flags = parse(TrainConfig, DESCRIPTION, without_help), given(TrainConfig, args=without_help)
    if flags.get("parallel") == "fsdp" and "RANK" not in os.environ:
        refuse(flags, ["parallel"], "in one process; start several: torchrun --nproc_per_node=2 train.py ...")
    if "max_minutes" in flags:
        refuse(flags, ["max_steps"], "beside --max-minutes")
    restarted = restart_folder(first.out)
    if restarted is not None:
        note(f"going on in {restarted}, where this launch of torchrun ({launch()}) trained before")
    out = restarted or first.out
    if first.resume or (restarted is not None and (restarted / STATE).exists()):
        return resume(out or newest(Path("out"), STATE, "python train.py")[0], args, flags)
    base = defaults(first.size)
    if first.init_from is not None:
        refuse(flags, (*SHAPE, "size"), f"beside --init-from {first.init_from}, which has its own")
        base = dataclasses.replace(base, **FINE_TUNING)
    config = parse(TrainConfig, DESCRIPTION, args, base)
    if not config.muon_lr:
        refuse(flags, ["weight_decay"], "with --muon-lr 0")
    if config.init_from is not None:
        config = dataclasses.replace(config, init_from=model_folder(config.init_from))
    return dataclasses.replace(config, out=out), None, None


class RunFile(TypedDict):
    """run.json, beside the training state."""

    flags: TrainConfig
    plan: Plan


def resume(out: Path, args: list[str], flags: dict) -> tuple[TrainConfig, Plan, TrainState]:
    """The flags of the run in `out`, which those given now replace; its plan, likewise; its state."""
    state, file = read_state(out), read_json(out / "run.json", RunFile)
    saved, plan, model = file["flags"], file["plan"], state["model_config"]
    if plan.block_size > model.block_size:
        raise UserError(f"{out}/run.json: block_size: expected at most {model.block_size}, the model's context, "
                        f"got {plan.block_size}")
    if "init_from" in flags:
        flags["init_from"] = model_folder(flags["init_from"]).resolve()
    if saved.init_from is not None and flags.get("block_size", 0) > plan.block_size:
        flags["block_size"] = plan.block_size  # the text or the model is shorter, as it was for the new run
    for name in FIXED:
        kept = plan.block_size if name == "block_size" else getattr(model if name in SHAPE else saved, name)
        if flags.get(name, kept) != kept:
            raise UserError(f"--resume: {name} is {kept} in {out}, expected the same, got {flags[name]}")
    config = dataclasses.replace(parse(TrainConfig, DESCRIPTION, args, saved), init_from=saved.init_from)
    if bool(config.muon_lr) != bool(saved.muon_lr):
        raise UserError(f"--resume: muon_lr is {saved.muon_lr:g} in {out}, got {config.muon_lr:g}; expected 0 for "
                        "both or for neither: the matrices have the state of one optimizer")
    decided = {name: flags[name] for name in flags.keys() & vars(plan).keys() if flags[name] != "auto"}
    if "data" in decided and decided["data"].is_file():
        decided["data"] = prepared(decided["data"], config.init_from)
    if "max_steps" in flags:
        config = dataclasses.replace(config, max_minutes=None)
    elif config.max_minutes:
        decided["max_steps"] = most_steps(config, plan.block_size, read_meta(plan.data)["train"]["tokens"])
    new = dataclasses.replace(plan, **decided | {"out": out})
    if new.max_steps != plan.max_steps:
        rates = [lr_scale(progress(c, p, state["step"], state["seconds"]), state["step"], c)
                 for c, p in ((saved, plan), (config, new))]
        note(f"{new.max_steps} steps instead of {plan.max_steps}: the learning rates go on at {rates[1]:.0%} "
             f"of their peak instead of {max(0, rates[0]):.0%}")
    return config, new, state


# ---------------------------------------------------------------- what the flags leave open

def decide(config: TrainConfig, device: torch.device) -> Plan:
    """The plan of a new run."""
    data = config.data or newest(Path("data"), "meta.json", "python data/prepare.py")[0]
    if not data.exists():
        raise UserError(f"--data {data}: expected a text or a folder made by data/prepare.py, found neither")
    if data.is_file():
        data = prepared(data, config.init_from)
    meta = read_meta(data)
    model, tokens, block_size = shape(config, meta), meta["train"]["tokens"], config.block_size
    longest = max(1, min(model.block_size, tokens - 1, meta["val"]["tokens"] - 1))
    if config.init_from is not None and longest < block_size:
        note(f"--block-size {block_size}: going on with {longest}, the longest for this model and text")
        block_size = longest
    steps = most_steps(config, block_size, tokens)
    if not config.init_from and not config.max_minutes:
        steps = min(steps, STEPS[config.size])
    steps, dropout = config.max_steps or steps, config.dropout
    if dropout is None:
        parameters = empty_model(model).num_params()
        dropout = pick_dropout(parameters, tokens, steps * config.batch_size * block_size / tokens)
    compile = config.compile
    if compile == "auto":
        long = config.max_minutes >= 2 if config.max_minutes else steps >= 1000
        compile = "on" if long and can_compile(device) else "off"
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    return Plan(data, new_folder(config, data), block_size, steps, dropout, dtype, compile, meta["train"]["sha256"])


def most_steps(config: TrainConfig, block_size: int, tokens: int) -> int:
    """Of a text of so many tokens, unless --max-steps says otherwise: the passes before it is learned by heart."""
    passes = FINE_TUNING_PASSES if config.init_from else PASSES
    return math.ceil(passes * tokens / (config.batch_size * block_size))


def parts_of(config: TrainConfig, ranks: Ranks) -> int:
    """Of each rank's share of a batch, one after another; None: single sequences."""
    return config.grad_accum or max(1, config.batch_size // ranks.world)


def new_folder(config: TrainConfig, data: Path) -> Path:
    """--out, which must hold no model yet, or the first free out/DATA-NAME, out/DATA-NAME-2, ..."""
    if config.out is not None:
        if (config.out / STATE).exists():
            raise UserError(f"{config.out}: holds a run already; --resume continues it, another --out starts afresh")
        if any(config.out.glob("*.safetensors")):
            raise UserError(f"{config.out}: holds a model already; name another --out")
        return config.out
    name = config.init_from.resolve().name if config.init_from else config.size
    stem, number = Path("out") / f"{data.name.removesuffix(f'-{name}')}-{name}", 1
    while (folder := stem if number == 1 else stem.with_name(f"{stem.name}-{number}")).exists():
        number += 1
    return folder


def shape(config: TrainConfig, meta: dict) -> GPTConfig:
    """Of a new model as the flags say, or of the one to fine-tune."""
    vocab_size, eos = meta["vocab_size"], meta.get("eos")
    if config.init_from is None:
        fields = {name: getattr(config, name) for name in (*SHAPE, "block_size")}
        if config.tie_embeddings is None:  # of bytes a matrix is small (docs/log.md, "Architecture")
            fields["tie_embeddings"] = vocab_size > 1024
        try:
            return GPTConfig(vocab_size, eos=eos, **fields)
        except ValueError as error:
            raise UserError(str(error)) from None
    model = config_from_hf(read_config(config.init_from), config.init_from / "config.json")
    if model.vocab_size < vocab_size:
        raise UserError(f"--init-from: the model knows {model.vocab_size} tokens, the data has {vocab_size}; "
                        f"prepare the data with {command('--tokenizer', config.init_from)}")
    if eos is not None and eos not in model.ends:  # what ends a text of the data ends what the model writes
        model.eos = [*model.ends, eos]
    return model


def pick_dropout(parameters: int, tokens: int, passes: float) -> float:
    """For a new model, by its parameters for each token of the text; none below two passes through it.

    docs/log.md, "Regularization".
    """
    if passes < 2:
        return 0.0
    return 0.2 if parameters > 20 * tokens else 0.1 if parameters > 2 * tokens else 0.0


# ---------------------------------------------------------------- a step

def lr_scale(done: float, step: int, config: TrainConfig) -> float:
    """A trapezoid (Zhai et al., 2022): up over warmup_steps, flat, down to zero over the last `warmdown` of the run.

    done: the share of the run that lies behind.
    """
    up = (step + 1) / max(1, config.warmup_steps)
    return min(1.0, up, (1 - done) / max(config.warmdown, 1e-12))


def progress(config: TrainConfig, plan: Plan, step: int, seconds: float) -> float:
    """The share of the run that is done: of its steps or, where these end first, of its minutes."""
    return max(step / plan.max_steps, seconds / 60 / config.max_minutes if config.max_minutes else 0.0)


# ---------------------------------------------------------------- the run

class Run:
    """A training run as this rank sees it. train() calls its steps: train_step, report, evaluate, save."""

    def __init__(self, config: TrainConfig, plan: Plan, ranks: Ranks, state: TrainState | None) -> None:
        self.config, self.plan, self.ranks, self.dtype = config, plan, ranks, getattr(torch, plan.dtype)
        self.step, self.seconds, self.best = 0, 0.0, math.inf  # steps done, their time; lowest validation loss
        if state is not None:
            self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"] or math.inf
        self.first = self.step  # the step that this process begins with
        self.share = config.batch_size // ranks.world  # sequences of a step on this rank
        self.step_tokens = config.batch_size * plan.block_size  # on all ranks together

        ranks.threads.adapt()
        torch.manual_seed(config.seed)
        self.data = TokenData(plan.data, plan.block_size, ranks.device, config.seed)
        if self.data.meta["train"]["sha256"] != plan.data_sha256:
            raise UserError(f"--resume: {plan.out} was trained on other data than {plan.data} now holds")
        self.tokenizer = read_tokenizer(plan.data)
        shaped = shape(config, self.data.meta) if state is None else state["model_config"]
        self.model = load_model(config.init_from) if config.init_from and state is None else GPT(shaped)
        self.model.config.dropout, self.model.config.eos = plan.dropout, shaped.eos
        self.wrapped = parallelize(self.model, ranks, config.parallel, self.dtype).train()
        self.optimizers = make_optimizers(self.model, config.muon_lr, self.dtype)
        if state is not None:
            load_tensors(training_tensors(self.model, self.optimizers), plan.out, state["tensors"])

        self.peak = peak_flops(ranks.device, self.dtype) * ranks.world
        self.epoch = self.data.tokens["train"] / self.step_tokens  # in steps
        # by default 8 evaluations (fine-tuning: 2), but at least one in 250 steps, and not so many that they take more
        # than a fifth of the time (of a token an evaluation takes 0.4 of a step's time)
        apart = 250 if config.max_minutes else math.ceil(plan.max_steps / (2 if config.init_from else 8))
        eval_steps = min(config.eval_tokens, self.data.tokens["val"]) / self.step_tokens
        self.every = config.eval_every or min(250, max(apart, math.ceil(2 * eval_steps)))
        self.signals, self.log = StopSignals(), None
        self.loss_sum = torch.zeros((), device=ranks.device)  # since the last report
        self.train_losses, self.before = [], (math.inf, math.inf)  # since the last evaluation, and what that one saw
        self.eval_seconds, self.step_seconds = 0.0, 0.0  # of the last evaluation; of a step, lately
        self.lately, self.better = deque(maxlen=20), False

    def begin(self) -> None:
        """Open the log, say what runs, compile."""
        config, plan, ranks = self.config, self.plan, self.ranks
        size = f"{self.model.num_params() / 1e6:.2f}M parameters"
        if ranks.is_main:
            if not self.step:
                for source in filter(None, (config.init_from, plan.data)):
                    copy_companions(source, plan.out)
            self.log = RunLog(plan.out, self.step, self.data.bits_per_nat, self.epoch,
                              f"{plan.out.name}: {size} on {plan.data.name}")
        minutes = f"{config.max_minutes:g} minutes, at most " if config.max_minutes else ""
        self.say(
            f"{plan.out}: {f'fine-tuning {config.init_from}' if config.init_from else config.size}, {size}, "
            f"{plan.data.name} ({self.data.tokens['train']:,} tokens), {minutes}steps {self.step} to {plan.max_steps} "
            f"({plan.max_steps / self.epoch:.1f} passes) of {self.step_tokens:,} tokens\n"
            f"{ranks.world} x {ranks.device.type}, {torch.get_num_threads()} threads each, {plan.dtype}, "
            f"dropout {plan.dropout:g}, matmul peak {self.peak / 1e9:,.0f} GFLOP/s"
            + "; compiling first, some 10 seconds" * (plan.compile == "on"))
        if plan.compile == "on":
            self.compile()
        if config.init_from:  # a block's activations are computed again for its backward pass, to save memory
            for block in self.model.model.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.bar = tqdm(total=1, initial=self.done(), dynamic_ncols=True, bar_format="{l_bar}{bar}|{postfix}",
                        disable=None if ranks.is_main else True)
        self.reported = self.timed = self.step  # steps whose loss, and whose time, has been reported
        self.clock = self.began = self.spoke = time.perf_counter()
        if config.init_from and not self.step:
            self.evaluate()
            self.best = math.inf  # the first save is of a trained model

    def compile(self) -> None:
        """Compile the blocks, in a step whose gradients are dropped. Where that fails they stay as they are."""
        compile_blocks(self.model.model.layers)
        x, y = self.data.batch(0, self.share // parts_of(self.config, self.ranks), 1)[0]
        try:
            forward_loss(self.wrapped, x, y, self.dtype).backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            note(f"torch.compile failed ({one_line(error)}); going on without it, more slowly")
            for block in self.model.model.layers:
                del block.forward  # uncovers the method of the class
        self.model.zero_grad()

    def done(self) -> float:
        """The share of the run that is done. The evaluation that ends it takes as long as the last one did."""
        return progress(self.config, self.plan, self.step, self.seconds + self.eval_seconds)

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            with optional("standard output"):
                tqdm.write(text)

    def train_step(self) -> None:
        """Forward and backward over this rank's share of the batch, part by part, and a step of the optimizers."""
        config, ranks = self.config, self.ranks
        if self.plan.dropout:  # drawn from (seed, step, rank), so that a resume repeats it
            torch.manual_seed(int(np.random.SeedSequence([config.seed, self.step, ranks.rank]).generate_state(1)[0]))
        first = self.step * config.batch_size + ranks.rank * self.share
        parts = self.data.batch(first, self.share, parts_of(config, ranks))
        for i, (x, y) in enumerate(parts):
            sync_gradients(self.wrapped, on=i == len(parts) - 1)  # summed over the ranks once they are whole
            loss = forward_loss(self.wrapped, x, y, self.dtype) / len(parts)
            loss.backward()
            self.loss_sum += loss.detach()
        self.lr_scale = lr_scale(self.done(), self.step, config)
        update(self.model, self.optimizers, (config.muon_lr * self.lr_scale, config.adam_lr * self.lr_scale),
               config.weight_decay, config.grad_clip)
        self.step += 1
        if self.step == self.first + 1:  # it warmed up: no measure of the others
            self.timed, self.began = self.step, time.perf_counter()

    def evaluation_due(self) -> bool:
        return self.step % self.every == 0 or self.done() >= 1

    def report_due(self) -> bool:
        """Whether the ranks exchange losses, times and signals after this step; they all come to the same answer."""
        minutes = self.config.max_minutes
        return (self.evaluation_due() or self.step % 10 == 0 or bool(minutes and not self.step_seconds)
                or self.step_seconds > (min(1.0, 0.3 * minutes) if minutes else 1.0)
                or (self.ranks.world == 1 and self.signals.asked is not None))

    def report(self) -> bool:
        """Loss and speed of the steps since the last report; whether a signal asked any rank to stop."""
        self.signals.say_once(self.say)
        loss = self.loss_sum.item()  # waits for the device
        now, steps = time.perf_counter(), self.step - self.timed
        loss, stops, interval, elapsed = (x / self.ranks.world for x in self.ranks.sum(
            loss / (self.step - self.reported), self.signals.asked is not None, now - self.began, now - self.clock))
        if not math.isfinite(loss):
            raise self.diverged(f"the loss is {loss}")
        self.train_losses.append(loss)
        self.seconds, self.clock = self.seconds + elapsed, now
        if steps:
            self.lately.append(interval / steps)
            self.step_seconds = statistics.median(self.lately)  # of a pause nothing remains
        if self.log:
            pace = {"tokens_per_second": self.step_tokens * steps / interval} if steps else {}
            self.log.add(step=self.step, train_loss=loss, lr_scale=self.lr_scale, **pace)
            self.bar.n = min(1, self.done())
            self.bar.set_postfix_str(f"{self.at()}, loss {loss:.3f}{self.speed()}")
            if self.bar.disable and now - self.spoke > 20 and not self.evaluation_due():
                self.spoke = now
                self.say(f"{self.at()}: train {loss:.3f} nats = {loss * self.data.bits_per_nat:.3f} bits/byte"
                         f"{self.speed()}")
        self.loss_sum.zero_()
        self.reported, self.timed, self.began = self.step, self.step, time.perf_counter()
        return stops > 0

    def at(self) -> str:
        of = f" ({min(1, self.done()):.0%})" if self.config.max_minutes else f"/{self.plan.max_steps}"
        return f"step {self.step}{of}"

    def speed(self) -> str:
        """Speed, and the time left after an evaluation at this step."""
        if not self.step_seconds:
            return ""
        evaluations = math.ceil(self.plan.max_steps / self.every) - self.step // self.every
        left = (self.plan.max_steps - self.step) * self.step_seconds
        left += evaluations * self.eval_seconds * (self.step < self.plan.max_steps)
        if self.config.max_minutes:
            left = min(left, max(0.0, 60 * self.config.max_minutes - self.seconds))
        pace = self.step_tokens / self.step_seconds
        return f", {pace:,.0f} tokens/s ({self.model.estimate_mfu(pace, self.peak):.0%} of peak), {duration(left)} left"

    def evaluate(self) -> None:
        """The validation loss, and a sample of the model's text."""
        ranks, start = self.ranks, time.perf_counter()
        if ranks.threads.adapt():
            self.peak = peak_flops(ranks.device, self.dtype) * ranks.world
        val_loss = evaluate(self.model, self.data, self.config.eval_tokens, ranks, self.dtype)
        if not math.isfinite(val_loss):
            raise self.diverged(f"the validation loss is {val_loss}")
        self.better, self.best = val_loss < self.best, min(self.best, val_loss)
        bits, text = val_loss * self.data.bits_per_nat, ""
        if ranks.is_main and self.config.parallel != "fsdp":  # whose ranks would all have to write
            with optional("a sample of the model's text"):
                text = self.sample()
        self.eval_seconds = ranks.sum(time.perf_counter() - start)[0] / ranks.world
        train_loss = sum(self.train_losses) / max(1, len(self.train_losses))
        if self.log:
            trained = f"train {self.train_losses[-1]:.3f}, " if self.train_losses else ""
            self.log.add(step=self.step, val_loss=val_loss, val_bits_per_byte=bits, **{"sample": text} if text else {})
            self.say(f"{self.at()}: {trained}validation {val_loss:.4f} nats = {bits:.4f} bits/byte"
                     f"{'' if self.better else ' (no better)'}{self.speed()}" + f"\n  {text}" * bool(text))
        if not self.better and train_loss < self.before[0] and val_loss > self.before[1]:
            note("the validation loss rises while the training loss falls: the model learns its text by heart; "
                 f"{self.plan.out} keeps the best model; more --dropout, a smaller size or fewer steps may do better")
        self.train_losses, self.before, self.began = [], (train_loss, val_loss), time.perf_counter()

    @torch.no_grad()
    def sample(self) -> str:
        """What the model writes behind the first words of the validation text, on one line."""
        prompt, _ = self.data.sequences("val", np.zeros(1, dtype=np.int64))
        self.model.eval()
        try:
            with uncompiled():
                # without a cache a GPU captures no graph, which 80 tokens would not pay for
                tokens = [token.item() for token in generate(
                    self.model, prompt[:, :32], 80, temperature=0.8, top_p=0.9, seed=self.config.seed,
                    use_cache=self.ranks.device.type != "cuda")]
        finally:
            self.model.train()
        text = "".join(self.tokenizer.decode(tokens).split(maxsplit=1)[-1:])  # from the first whole word on
        text = " / ".join(filter(None, map(str.strip, text.splitlines())))
        return "".join(letter for letter in text if letter.isprintable())

    def save(self) -> None:
        """run.json, all that a resume needs, and the model where it is the best so far.

        The state comes before the model: after a crash between the two, a resume takes the model from the state. All
        ranks must call this: each may hold a part.
        """
        tensors, out = gather_to_main(training_tensors(self.model, self.optimizers), self.ranks), self.plan.out
        if self.ranks.is_main:
            weights = weights_of(tensors)
            if not all(weight.sum().isfinite() for weight in weights.values()):
                raise self.diverged("a weight is not finite")
            better = self.better or not holds_model(out)
            write_json(out / "run.json", {"flags": plain(self.config), "plan": plain(self.plan)})
            write_tensors(out / STATE, tensors, step=self.step, seconds=self.seconds, better=better,
                          best=self.best if math.isfinite(self.best) else None, model_config=vars(self.model.config))
            if better:
                save_weights(weights, self.model.config, out)
            self.log.plot()
        self.better, self.began = False, time.perf_counter()

    def finish(self) -> int:
        """Say what came of the run; the exit code."""
        self.bar.close()
        out, done = self.plan.out, self.done() >= 1
        if self.log:
            self.log.close()
            bits = self.best * self.data.bits_per_nat
            self.say(f"{out}: best validation {self.best:.4f} nats, {bits:.4f} bits/byte\n"
                     f"{self.log.curve()} the whole curve: {out / 'loss.png'}\n"
                     f"next: {command('python', 'sample.py', '--checkpoint', out)}" if done else
                     f"stopped at step {self.step}; go on with: "
                     f"{command('python', 'train.py', '--resume', '--out', out)}")
        return 0 if done else 128 + (self.signals.asked or signal.SIGTERM)

    def diverged(self, what: str) -> UserError:
        left = "keeps its last checkpoint" if holds_model(self.plan.out) else "has no checkpoint yet"
        return UserError(f"step {self.step}: {what}; {self.plan.out} {left}. Try lower --muon-lr and "
                         f"--adam-lr (now {self.config.muon_lr:g} and {self.config.adam_lr:g})")


def plain(record: TrainConfig | Plan) -> dict:
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in vars(record).items()}


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def may_begin(config: TrainConfig, plan: Plan | None, ranks: Ranks, state: TrainState | None) -> bool:
    """False where the run has done its steps. Raises UserError where the ranks cannot do them together."""
    parts = ranks.world * parts_of(config, ranks)
    if config.batch_size % parts:
        raise UserError(f"--batch-size: expected a multiple of ranks x grad-accum = {parts}, got {config.batch_size}")
    found = ranks.all_values((f"step {state['step']} of {plan.out}", state["sha256"]) if state else ("nothing", ""))
    if len(set(found)) > 1:
        raise UserError("the ranks found different states to go on from, rank by rank: "
                        f"{', '.join(name for name, _ in found)}; expected the same on every machine")
    if state is None:
        return True
    if ranks.is_main and state["better"] and not holds_weights(plan.out, weights_of(state["tensors"])):
        with lock(plan.out, launch()):  # the run was killed before it saved its model
            save_weights(weights_of(state["tensors"]), state["model_config"], plan.out)
    if progress(config, plan, state["step"], state["seconds"]) < 1:
        return True
    if ranks.is_main:
        what = "--max-minutes" if config.max_minutes else "--max-steps"
        print(f"{plan.out} is trained for {state['step']} steps already; raise {what} to go on")
    return False


def train(config: TrainConfig, ranks: Ranks, plan: Plan | None = None, state: TrainState | None = None) -> int:
    """Train from the start, or go on from a saved plan and state.

    Returns the exit code: 0, or 128 + the signal that asked to stop.
    """
    if not may_begin(config, plan, ranks, state):
        return 0
    plan = plan or ranks.main_does(lambda: decide(config, ranks.device))
    run = Run(config, plan, ranks, state)
    with lock(plan.out, launch()) if ranks.is_main else contextlib.nullcontext(), run.signals.heard():
        run.begin()
        while run.done() < 1:
            run.train_step()
            if not run.report_due():
                continue
            stop, due = run.report(), run.evaluation_due()
            if due:
                run.evaluate()
            if due or stop:
                run.save()
            if stop:
                break
        return run.finish()


def main() -> None:
    config, plan, state = read_flags(sys.argv[1:])
    ranks = Ranks(config.device, config.threads)
    try:
        code = train(config, ranks, plan, state)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        sys.exit(f"train.py: rank {ranks.rank} lost another rank; --resume continues from the last checkpoint")
    ranks.close()
    sys.exit(code)


if __name__ == "__main__":
    run(main)
