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
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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

import numpy as np
import torch
import torch.distributed as dist
from msgspec import Meta
from tqdm import tqdm

from checkpoint import (
    config_from_hf,
    copy_companions,
    holds_model,
    load_model,
    read_config,
    read_last_state,
    read_run,
    read_tokenizer,
    save_weights,
    write_state,
)
from corpus import PrepareConfig, prepare
from dataloader import TokenData, evaluate, forward_loss, read_meta, uncompiled
from distributed import Ranks, gather_to_main, launch, parallelize, restart_folder, sync_gradients
from fetch import model_folder
from files import checked, lock, newest, write_json
from generate import generate
from machine import can_compile, peak_flops
from model import GPT, SIZES, GPTConfig
from muon import Optimizer, load_optimizer, make_optimizers, pick_dtypes, update
from runlog import RunLog

DESCRIPTION = "Train a GPT on prepared tokens, in one process or under torchrun."


# ---------------------------------------------------------------- flags

@dataclass
class TrainConfig:
    """The defaults are tiny's (docs/log.md, "Training recipe"); SIZE_DEFAULTS replaces some for other sizes."""

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
    dropout: float | None = flag(None, "Share of each block's output to drop; default: 0 to 0.2, by text and run.")

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
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "Of matrix products; auto: what is faster here.")
    muon_dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "Of Muon's products; auto: as --dtype.")
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile (10 seconds); auto: for 1000 steps or more.")
    threads: Threads | None = flag(None, "CPU threads of each rank; default: as many as cores are free.")
    parallel: Literal["ddp", "fsdp"] = flag("ddp", "Each rank has the whole model (ddp) or a part of it (fsdp).")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks together."""
        return self.batch_size * self.block_size


RATES = {"muon_lr": 0.01, "adam_lr": 1.5e-3}  # of small, and a guess for larger models
SIZE_DEFAULTS = {"tiny": {}, "small": RATES, "base": RATES, "medium": RATES}
# docs/log.md, "Fine-tuning". None: parts_of() looks at the ranks.
FINE_TUNING = {"batch_size": 4, "grad_accum": None, "block_size": 512, "muon_lr": 0.0, "adam_lr": 1e-4,
               "warmup_steps": 5, "warmdown": 0.9, "dropout": 0.0}
FINE_TUNING_PASSES = 2
# Of a default run at most: steps, and passes through the text (docs/log.md, "Length of a run")
STEPS, PASSES = {"tiny": 2000, "small": 3000, "base": 5000, "medium": 10_000}, 8
EVAL_COST = 0.4  # of a training step's for as many tokens, until one has been timed
# The flags that shape a new model have the names of GPTConfig's fields. A fine-tuned model has its own shape.
SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "qk_norm", "tie_embeddings")
ARCHITECTURE = (*SHAPE, "block_size", "dropout")
# What a resumed run cannot change; losses over other tokens could not be compared.
FIXED = ("size", "init_from", "eval_tokens", *SHAPE, "block_size")


def defaults(size: str) -> TrainConfig:
    return TrainConfig(size=size, **SIZES[size], **SIZE_DEFAULTS[size])


def read_flags(args: list[str]) -> tuple[TrainConfig, dict | None]:
    """Flags over the size's defaults; or (--resume) over the run's own settings, and its saved state."""
    without_help = [a for a in args if a not in ("-h", "--help")]
    first, flags = parse(TrainConfig, DESCRIPTION, without_help), given(TrainConfig, args=without_help)
    if flags.get("parallel") == "fsdp" and "RANK" not in os.environ:
        refuse(flags, ["parallel"], "in one process; start several: torchrun --nproc_per_node=2 train.py ...")
    if "max_minutes" in flags:
        refuse(flags, ["max_steps"], "beside --max-minutes")
    out = restart_folder(first.out)
    if out is not None:
        note(f"going on in {out}, where this launch of torchrun ({launch()}) trained before")
    if first.resume or (out is not None and (out / "train_state.pt").exists()):
        return resume(out or first.out or newest(Path("out"), "train_state.pt", "python train.py")[0], args, flags)
    base = defaults(first.size)
    if first.init_from is not None:
        refuse(flags, (*SHAPE, "size"), f"beside --init-from {first.init_from}, which has its own")
        base = dataclasses.replace(base, **FINE_TUNING)
    config = parse(TrainConfig, DESCRIPTION, args, base)
    if not config.muon_lr:
        refuse(flags, ("weight_decay", "muon_dtype"), "with --muon-lr 0")
    init_from = config.init_from and model_folder(config.init_from)
    return dataclasses.replace(config, out=out or config.out, init_from=init_from), None


def resume(out: Path, args: list[str], flags: dict) -> tuple[TrainConfig, dict]:
    """The settings of the run in `out`, which the given flags replace, and its state."""
    state, damage = read_last_state(out)
    if damage:
        note(damage)
    settings, state["data_sha256"] = read_run(out)
    settings = {name: value for name, value in settings.items() if name not in ("out", "resume")}
    saved = checked(settings, TrainConfig, out / "run.json")
    if saved.block_size > state["model_config"].block_size:
        raise UserError(f"{out}/run.json: --block-size: expected at most {state['model_config'].block_size}, the "
                        f"model's context, got {saved.block_size}")
    if saved.max_steps is None:
        raise UserError(f"{out}/run.json: max_steps: expected a number, got none")
    if "init_from" in flags:
        flags["init_from"] = model_folder(flags["init_from"])
    if saved.init_from is not None and flags.get("block_size", 0) > saved.block_size:
        flags["block_size"] = saved.block_size  # settle() has shortened it
    for name in FIXED:
        kept = getattr(state["model_config"] if name in SHAPE else saved, name)
        got = flags.get(name, kept)
        if (got.resolve() if isinstance(got, Path) else got) != kept:
            raise UserError(f"--resume: {name} is {kept} in {out}, expected the same, got {got}")
    config = dataclasses.replace(parse(TrainConfig, DESCRIPTION, args, saved), out=out, block_size=saved.block_size,
                                 init_from=saved.init_from)
    if bool(config.muon_lr) != bool(saved.muon_lr):
        raise UserError(f"--resume: muon_lr is {saved.muon_lr:g} in {out}, got {config.muon_lr:g}; expected 0 for "
                        "both or for neither: the matrices have the state of one optimizer")
    if "max_steps" in flags:
        config.max_minutes = None
    elif "max_minutes" in flags:  # a first guess
        longer = saved.max_minutes and config.max_minutes / saved.max_minutes
        config.max_steps = math.ceil(saved.max_steps * longer) if longer else state["step"] + saved.max_steps
    if config.max_steps != saved.max_steps:
        rates = [lr_scale(state["step"], of) for of in (saved, config)]
        note(f"{config.max_steps} steps instead of {saved.max_steps}: the learning rates go on at {rates[1]:.0%} "
             f"of their peak instead of {max(0, rates[0]):.0%}")
    return config, state


# ---------------------------------------------------------------- where from, where to

def settle(config: TrainConfig, ranks: Ranks, state: dict | None) -> bool:
    """Fill in what the flags leave open. False: the run has done its steps already. All ranks agree on the answers."""
    parts = ranks.world * parts_of(config, ranks)
    if config.batch_size % parts:
        raise UserError(f"--batch-size: expected a multiple of ranks x grad-accum = {parts}, got {config.batch_size}")
    found = ranks.all_values((f"step {state['step']} of {config.out}", state["sha256"]) if state else ("nothing", ""))
    if len(set(found)) > 1:
        raise UserError("the ranks found different states to go on from, rank by rank: "
                        f"{', '.join(name for name, _ in found)}; expected the same on every machine")
    if state is not None and ranks.is_main and not holds_model(config.out):
        with lock(config.out, launch()):  # the run was killed in its first save
            save_weights(state["model"], state["model_config"], config.out)
    if state is not None and state["step"] >= config.max_steps:
        if ranks.is_main:
            what = "--max-minutes" if config.max_minutes else "--max-steps"
            print(f"{config.out} is trained for {state['step']} steps already; raise {what} to go on")
        return False
    pretrained = None
    if config.init_from is not None and state is None:
        pretrained = config_from_hf(read_config(config.init_from), config.init_from / "config.json")
    config.data = config.data or newest(Path("data"), "meta.json", "python data/prepare.py")[0]
    if not config.data.exists():
        raise UserError(f"--data {config.data}: expected a text or a folder made by data/prepare.py, found neither")
    if config.data.is_file():
        config.data = prepared(config.data, config.init_from, ranks)
    if pretrained is not None:
        train, val = (read_meta(config.data)[split]["tokens"] for split in ("train", "val"))
        longest = max(1, min(pretrained.block_size, train - 1, val - 1))
        if longest < config.block_size:
            note(f"--block-size {config.block_size}: going on with {longest}, the longest for this model and text")
            config.block_size = longest
    steps = most_steps(config, read_meta(config.data)["train"]["tokens"])
    config.max_steps = ranks.all_values(
        config.max_steps or (steps if config.init_from else min(steps, STEPS[config.size])))[0]
    config.out = ranks.all_values(config.out if state else new_folder(config))[0]
    if config.compile == "auto":  # settled for resumed runs too: they are to have the same arithmetic
        long = config.max_minutes >= 2 if config.max_minutes else config.max_steps >= 1000
        config.compile = "on" if long and can_compile(ranks.device) else "off"
    return True


def most_steps(config: TrainConfig, tokens: int) -> int:
    """Of a text of so many tokens, unless --max-steps says otherwise: the passes before it is learned by heart."""
    return math.ceil((FINE_TUNING_PASSES if config.init_from else PASSES) * tokens / config.step_tokens)


def parts_of(config: TrainConfig, ranks: Ranks) -> int:
    """Of each rank's share of a batch, one after another; None: single sequences."""
    return config.grad_accum or max(1, config.batch_size // ranks.world)


def prepared(text: Path, init_from: Path | None, ranks: Ranks) -> Path:
    """The folder that data/prepare.py makes of a text, made now unless it is there."""
    folder = Path("data") / (text.stem + (f"-{init_from.resolve().name}" if init_from else ""))
    meta, config = folder / "meta.json", PrepareConfig(input=(text,), out=folder, tokenizer=init_from)
    ranks.main_does(lambda: meta.exists() or prepare(config))
    same = read_meta(folder).get("inputs") == [str(text.resolve())] and meta.stat().st_mtime > text.stat().st_mtime
    if init_from is not None:
        same = same and read_tokenizer(folder).get_vocab() == read_tokenizer(init_from).get_vocab()
    if not same:
        flags = words({"input": text.resolve(), "out": folder, "tokenizer": init_from})
        raise UserError(f"--data {text}: {folder} holds tokens of another text, an older one or another model; make it "
                        f"anew with {command('python', 'data/prepare.py', *flags)}, or name a folder")
    return folder


def new_folder(config: TrainConfig) -> Path:
    """--out, which must hold no model yet, or the first free out/DATA-NAME, out/DATA-NAME-2, ..."""
    if config.out is not None:
        if (config.out / "train_state.pt").exists():
            raise UserError(f"{config.out}: holds a run already; --resume continues it, another --out starts afresh")
        if any(config.out.glob("*.safetensors")):
            raise UserError(f"{config.out}: holds a model already; name another --out")
        return config.out
    name = config.init_from.resolve().name if config.init_from else config.size
    stem, number = Path("out") / f"{config.data.name.removesuffix(f'-{name}')}-{name}", 1
    while (folder := stem if number == 1 else stem.with_name(f"{stem.name}-{number}")).exists():
        number += 1
    return folder


def build_model(config: TrainConfig, vocab_size: int, eos: int | None = None) -> GPT:
    """A new model as the flags say, or the one to fine-tune."""
    if config.init_from is None:
        shape = {name: getattr(config, name) for name in ARCHITECTURE} | {"dropout": config.dropout or 0.0}
        if config.tie_embeddings is None:  # of bytes a matrix is small (docs/log.md, "Architecture")
            shape["tie_embeddings"] = vocab_size > 1024
        try:
            return GPT(GPTConfig(vocab_size, eos=eos, **shape))
        except ValueError as error:
            raise UserError(str(error)) from None
    model = load_model(config.init_from, config.dropout or 0.0)
    if model.config.vocab_size < vocab_size:
        raise UserError(f"--init-from: the model knows {model.config.vocab_size} tokens, the data has {vocab_size}; "
                        f"prepare the data with {command('--tokenizer', config.init_from)}")
    if eos is not None and eos not in model.config.ends:  # what ends a text of the data ends what the model writes
        model.config.eos = [*model.config.ends, eos]
    return model


def pick_dropout(parameters: int, tokens: int, passes: float) -> float:
    """For a new model, by its parameters for each token of the text; none below two passes through it.

    docs/log.md, "Regularization".
    """
    if passes < 2:
        return 0.0
    return 0.2 if parameters > 20 * tokens else 0.1 if parameters > 2 * tokens else 0.0


def lr_scale(step: int, config: TrainConfig) -> float:
    """A trapezoid (Zhai et al., 2022): up over warmup_steps, flat, down to zero over the last `warmdown` of the run."""
    up = (step + 1) / max(1, config.warmup_steps)
    down = (config.max_steps - step) / max(1.0, config.warmdown * config.max_steps)
    return min(1.0, up, down)


# ---------------------------------------------------------------- the run

class Run:
    """A training run as this rank sees it. train() calls its steps: train_step, report, evaluate, save."""

    def __init__(self, config: TrainConfig, ranks: Ranks, state: dict | None, at_exit: contextlib.ExitStack) -> None:
        self.config, self.ranks = config, ranks

        # model and data
        torch.manual_seed(config.seed)
        if state is None:
            meta = read_meta(config.data)
            self.model = build_model(config, meta["vocab_size"], meta.get("eos"))
        else:
            self.model = GPT(state["model_config"])
            self.model.load_state_dict(state["model"])
        self.data = TokenData(config.data, config.block_size, ranks.device, config.seed)
        self.data_sha256 = self.data.meta["train"]["sha256"]
        if state is not None and state["data_sha256"] != self.data_sha256:
            raise UserError(f"--resume: {config.out} was trained on other data than {config.data} now holds")
        ranks.threads.adapt()
        tokens = config.batch_size // ranks.world // parts_of(config, ranks) * config.block_size
        dtypes = pick_dtypes(self.model, ranks.device, tokens, config.dtype, config.muon_dtype)
        self.dtype, muon_dtype = ranks.all_values(dtypes)[0]  # measured by every rank, so that none waits
        # settled for resumed runs too: they are to have the same arithmetic
        config.dtype, config.muon_dtype = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, muon_dtype))
        self.wrapped = parallelize(self.model, ranks, config.parallel, self.dtype, config.compile == "on").train()
        self.optimizers = make_optimizers(self.model, config.muon_lr, muon_dtype)
        self.first, self.best = 0, math.inf  # step to begin with; best validation loss
        if state is not None:
            self.first, self.best = state["step"], state["best"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
            state.clear()  # it has been copied: free its memory
        self.peak = peak_flops(ranks.device, self.dtype) * ranks.world
        self.epoch = self.data.tokens["train"] / config.step_tokens  # in steps
        if config.dropout is None:
            steps = config.max_steps
            if config.max_minutes:  # about as many, at a usual share of the peak
                steps = 60 * config.max_minutes * 0.3 * self.peak / self.model.flops_per_token() / config.step_tokens
            config.dropout = ranks.all_values(
                pick_dropout(self.model.num_params(), self.data.tokens["train"], steps / self.epoch))[0]
        self.model.config.dropout = config.dropout

        # log, checkpoints, signals
        if ranks.is_main:
            at_exit.enter_context(lock(config.out, launch()))
            if state is None:
                for source in filter(None, (config.init_from, config.data)):
                    copy_companions(source, config.out)
        self.saver, self.saving = ThreadPoolExecutor(1), None
        title = f"{config.out.name}: {self.model.num_params() / 1e6:.1f}M parameters on {config.data.name}"
        self.tokenizer = read_tokenizer(config.data)
        self.eval_tokens = min(config.eval_tokens, self.data.tokens["val"])
        # by default 8 evaluations (fine-tuning: 2), but no fewer than one in 250 steps, nor so many that they take more
        # than a fifth of the time
        apart = 250 if config.max_minutes else math.ceil(config.max_steps / (2 if config.init_from else 8))
        self.every = config.eval_every or min(
            250, max(apart, math.ceil(5 * EVAL_COST * self.eval_tokens / config.step_tokens)))
        self.log = RunLog(config.out, self.first, self.data.bits_per_nat, self.epoch, title) if ranks.is_main else None
        self.signals = StopSignals()
        at_exit.enter_context(self.signals.heard())
        at_exit.callback(self.wait_for_save)  # before signals kill again: torchrun sends one when another rank has died

        # what is measured between two reports
        self.bar = tqdm(total=config.max_steps, initial=self.first, unit="step", dynamic_ncols=True,
                        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
                        disable=None if ranks.is_main else True)
        self.loss_sum = torch.zeros((), device=ranks.device)
        self.reported = self.timed = self.first  # steps whose loss, and whose time, has been reported
        self.started = self.began = self.spoke = time.perf_counter()
        self.step_seconds, self.eval_seconds = 0.0, None  # of a step, lately; of the last evaluation
        self.train_loss, self.pace, self.slow, self.better = math.nan, 0.0, False, False
        self.losses, self.before = [], (math.inf, math.inf)  # training losses since the last evaluation; what it saw

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            with optional("standard output"):
                tqdm.write(text)

    def announce(self) -> None:
        config = self.config
        what = f"fine-tuning {config.init_from}" if config.init_from else config.size
        length = f"steps {self.first} to {config.max_steps} ({config.max_steps / self.epoch:.1f} passes)"
        if config.max_minutes:
            length = f"{config.max_minutes:g} minutes of steps from {self.first} on,"
        self.say(
            f"{config.out}: {what}, {self.model.num_params() / 1e6:.2f}M parameters, {config.data.name} "
            f"({self.data.tokens['train']:,} tokens), {length} of "
            f"{config.step_tokens:,} tokens\n"
            f"{self.ranks.world} x {self.ranks.device.type}, {torch.get_num_threads()} threads each, "
            f"{config.dtype}{f' (Muon {config.muon_dtype})' if config.muon_lr else ''}, dropout {config.dropout:g}, "
            f"matmul peak {self.peak / 1e9:,.0f} GFLOP/s"
            f"{'; compiling first, some 10 seconds' if config.compile == 'on' else ''}")
        if config.init_from and not self.first:
            self.evaluate(0)
            self.best = math.inf  # the first save is of a trained model

    def train_step(self, step: int) -> None:
        """Forward and backward over this rank's share of the batch, part by part, and a step of the optimizers."""
        config, ranks = self.config, self.ranks
        if self.model.config.dropout:  # drawn from (seed, step, rank), so that a resume repeats it
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, ranks.rank]).generate_state(1)[0]))
        share = config.batch_size // ranks.world
        parts = self.data.batch(step * config.batch_size + ranks.rank * share, share,
                                parts_of(config, ranks))
        for i, (x, y) in enumerate(parts):
            sync_gradients(self.wrapped, on=i == len(parts) - 1)  # summed over the ranks once they are whole
            try:
                loss = forward_loss(self.wrapped, x, y, self.dtype) / len(parts)
                loss.backward()
            except Exception as error:
                if config.compile == "off" or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                    raise
                note(f"torch.compile failed ({one_line(error)}); going on without it, more slowly")
                config.compile = "off"
                for block in self.model.model.layers:
                    del block.forward  # the class's own comes to light
                self.model.zero_grad()
                return self.train_step(step)
            self.loss_sum += loss.detach()
        scale = lr_scale(step, config)
        update(self.model, self.optimizers, (config.muon_lr * scale, config.adam_lr * scale), config.weight_decay,
               config.grad_clip)
        self.bar.update()
        if step == self.first:  # it compiled: no measure of the others
            self.timed, self.began = step + 1, time.perf_counter()

    def evaluation_due(self, done: int) -> bool:
        return done == self.config.max_steps or done % self.every == 0

    def report_due(self, done: int) -> bool:
        """Whether the ranks exchange losses and stop signals after step `done`; they all come to the same answer."""
        return (self.evaluation_due(done) or done % 10 == 0 or self.slow
                or bool(self.config.max_minutes and not self.pace)
                or (self.ranks.world == 1 and self.signals.asked is not None))

    def report(self, done: int) -> bool:
        """Loss and speed of the steps since the last report; whether a signal asked any rank to stop."""
        config, ranks, steps = self.config, self.ranks, done - self.timed
        self.signals.say_once(self.say)
        loss = self.loss_sum.item()  # waits for the device
        now = time.perf_counter()
        total, stops, seconds, elapsed = ranks.sum(loss, float(self.signals.asked is not None), now - self.began,
                                                   now - self.started)
        self.train_loss = total / ranks.world / (done - self.reported)
        self.losses.append(self.train_loss)
        if not math.isfinite(self.train_loss):
            raise diverged(config, done, f"the loss is {self.train_loss}")
        if steps:
            step_seconds = seconds / ranks.world / steps
            self.pace, self.slow = config.step_tokens / step_seconds, step_seconds > 1
            self.step_seconds += (step_seconds - self.step_seconds) * max(0.1, steps / (done - self.first - 1))
            if config.max_minutes:  # as many steps as the rest of the time holds
                each = self.step_seconds + self.evaluation() / self.every
                rest = 60 * config.max_minutes - elapsed / ranks.world - self.first * each - self.evaluation()
                fit, most = done + max(0, int(rest / each)), most_steps(config, self.data.tokens["train"])
                if fit > most:
                    note(f"the run ends after {most:,} steps, {most / self.epoch:.0f} passes through the text, before "
                         "its minutes do: more would be learned by heart; --max-steps makes more")
                config.max_steps = self.bar.total = min(fit, max(done, most))
        if self.log:
            self.log.add(step=done, train_loss=self.train_loss, lr_scale=lr_scale(done - 1, config),
                         **{"tokens_per_second": self.pace} if self.pace else {})
            self.bar.set_postfix_str(f"loss {self.train_loss:.3f}{self.speed(done)}", refresh=False)
            if self.bar.disable and time.perf_counter() - self.spoke > 20 and not self.evaluation_due(done):
                self.spoke = time.perf_counter()
                self.say(f"step {done}/{config.max_steps}: train {self.train_loss:.3f} nats = "
                         f"{self.train_loss * self.data.bits_per_nat:.3f} bits/byte{self.speed(done)}")
        self.loss_sum.zero_()
        self.reported = self.timed = done
        self.began, self.better = time.perf_counter(), False
        return stops > 0

    def evaluation(self) -> float:
        """Seconds of an evaluation: of the last one, or before the first an estimate from those of a step."""
        if self.eval_seconds is not None:
            return self.eval_seconds
        return EVAL_COST * self.step_seconds * self.eval_tokens / self.config.step_tokens

    def speed(self, done: int) -> str:
        """Speed, and the time left after an evaluation at step `done`."""
        if not self.pace:
            return ""
        config = self.config
        next_one = done - done % self.every + self.every
        evaluations = len(range(next_one, config.max_steps, self.every)) + (done < config.max_steps)
        left = (config.max_steps - done) * self.step_seconds + evaluations * self.evaluation()
        return (f", {self.pace:,.0f} tokens/s ({self.model.estimate_mfu(self.pace, self.peak):.0%} of peak), "
                f"{duration(left)} left")

    def evaluate(self, done: int) -> None:
        config, ranks, start = self.config, self.ranks, time.perf_counter()
        if ranks.threads.adapt():
            self.peak = peak_flops(ranks.device, self.dtype) * ranks.world
        val_loss = evaluate(self.model, self.data, config.eval_tokens, ranks, self.dtype)
        if not math.isfinite(val_loss):
            raise diverged(config, done, f"the validation loss is {val_loss}")
        self.better, self.best = val_loss < self.best, min(self.best, val_loss)
        train_loss, self.losses = sum(self.losses) / max(1, len(self.losses)), []
        overfits = not self.better and val_loss > self.before[1] and train_loss < self.before[0]
        self.before = train_loss, val_loss
        bits, text = val_loss * self.data.bits_per_nat, ""
        if ranks.is_main and config.parallel != "fsdp":  # whose ranks would all have to write
            with optional("a sample of the model's text"):
                text = self.sample()
        self.eval_seconds = ranks.sum(time.perf_counter() - start)[0] / ranks.world
        if self.log:
            trained = f"train {self.train_loss:.3f}, " if done else ""
            self.log.add(step=done, val_loss=val_loss, val_bits_per_byte=bits, **{"sample": text} if text else {})
            self.say(f"step {done}/{config.max_steps}: {trained}validation {val_loss:.4f} nats = {bits:.4f} bits/byte"
                     f"{'' if self.better else ' (no better)'}{self.speed(done)}")
            if text:
                self.say(f"  {text}")
        if overfits:
            note("the validation loss rises while the training loss falls: the model learns its text by heart; "
                 f"{config.out} keeps the best model; more --dropout, a smaller size or fewer steps may do better")

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

    def save(self, done: int) -> None:
        """Copy weights and optimizers, and write them while training goes on."""
        trained = snapshot(self.model, self.optimizers, self.ranks)
        if self.ranks.is_main:
            self.wait_for_save()
            self.saving = self.saver.submit(save_checkpoint, self.config, self.model.config, trained, self.better,
                                            done, self.best, self.data_sha256, self.log)
        self.began = time.perf_counter()

    def wait_for_save(self) -> None:
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()  # raises what the save raised

    def finish(self, done: int) -> int:
        """Wait for the last save, say what came of it; the exit code."""
        self.bar.close()
        self.wait_for_save()
        if self.log:
            self.log.close()
        out = self.config.out
        if done < self.config.max_steps:
            self.say(f"stopped at step {done}; go on with: {command('python', 'train.py', '--resume', '--out', out)}")
            return 128 + (self.signals.asked or signal.SIGTERM)
        if self.log:
            self.say(f"{out}: best validation {self.best:.4f} nats, {self.best * self.data.bits_per_nat:.4f} "
                     f"bits/byte\n{self.log.curve()} the whole curve: {out / 'loss.png'}\n"
                     f"next: {command('python', 'sample.py', '--checkpoint', out)}")
        return 0


def snapshot(model: GPT, optimizers: Sequence[Optimizer], ranks: Ranks) -> dict:
    """A copy of what training has made so far, on rank 0's CPU. All ranks must call this: each may hold a part."""
    weights = model.state_dict()
    if model.config.tie_embeddings:  # one matrix, copied once
        del weights["lm_head.weight"]
    state = gather_to_main({"model": dict(weights), "optimizers": [{"state": opt.state} for opt in optimizers]}, ranks)
    if model.config.tie_embeddings:
        state["model"]["lm_head.weight"] = state["model"]["model.embed_tokens.weight"]
    return state


def save_checkpoint(config: TrainConfig, model_config: GPTConfig, trained: dict, better: bool, step: int, best: float,
                    data_sha256: str, log: RunLog) -> None:
    """model.safetensors (the best model so far), run.json, train_state.pt (all else that a resume needs), loss.png.

    The weights are written before the state, so a crash between the two loses nothing: the resumed run writes the same
    weights again. The first save is the exception: a model without a state could not be resumed, so the state comes
    first, and a resume takes the model from it.
    """
    # NumPy, not torch: a second thread that computes with torch has OpenMP threads of its own, and with more threads
    # than cores every wait of the training becomes three times as long, to the end of the run
    if not all(np.isfinite(weight.numpy()).all() for weight in trained["model"].values()):
        raise diverged(config, step, "a weight is not finite")
    first = not holds_model(config.out)
    if better and not first:
        save_weights(trained["model"], model_config, config.out)
    settings = {name: str(value.resolve()) if isinstance(value, Path) else value
                for name, value in vars(config).items() if name not in ("out", "resume")}
    write_json(config.out / "run.json", {"settings": settings, "data_sha256": data_sha256})
    write_state(config.out / "train_state.pt", {
        "step": step, "best": best, "model_config": dataclasses.asdict(model_config), **trained})
    if first:
        save_weights(trained["model"], model_config, config.out)
    log.plot()


def diverged(config: TrainConfig, step: int, what: str) -> UserError:
    left = "keeps its last checkpoint" if holds_model(config.out) else "has no checkpoint yet"
    return UserError(f"step {step}: {what}; {config.out} {left}. Try lower --muon-lr and "
                     f"--adam-lr (now {config.muon_lr:g} and {config.adam_lr:g})")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def train(config: TrainConfig, ranks: Ranks, state: dict | None = None) -> int:
    """Train from a saved state or from the start. Returns the exit code: 0, or 128 + the signal that asked to stop."""
    if not settle(config, ranks, state):
        return 0
    with contextlib.ExitStack() as at_exit:  # what must be done however the run ends
        run = Run(config, ranks, state, at_exit)
        run.announce()
        done = run.first
        while done < config.max_steps:
            run.train_step(done)
            done += 1
            if not run.report_due(done):
                continue
            stop = run.report(done)
            due = run.evaluation_due(done)  # only now: with --max-minutes, report() sets the last step
            if due:
                run.evaluate(done)
            if due or stop:
                run.save(done)
            if stop:
                break
        return run.finish(done)


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
