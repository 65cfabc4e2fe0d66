"""What a training run is told, and what it decides: flags, defaults by size, the plan, the schedule.

A flag goes one way: read_flags() takes it from the command line, or from the run.json of the run to go on with, into a
TrainConfig, which stays as it is. decide() makes a Plan of what the flags leave open. train.py reads both.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import torch
from msgspec import Meta

from dataloader import read_meta
from lib.checkpoint import STATE, TrainState, config_from_hf, empty_model, read_config, read_state
from lib.cli import Count, NonNegative, Seed, Threads, UserError, command, flag, given, note, parse, refuse
from lib.corpus import another_tokenizer, data_folder, prepare_command, same_tokenizer
from lib.distributed import Ranks, launch, restart_folder
from lib.fetch import MODEL, model_folder
from lib.files import newest, numbered, read_json
from lib.machine import can_compile, pick_dtype
from model import SIZES, GPTConfig

DESCRIPTION = "Train a GPT on prepared tokens, in one process or under torchrun."


# ---------------------------------------------------------------- flags

Share = Annotated[float, Meta(ge=0, lt=1)]
Rate = Annotated[float, Meta(ge=0, le=1e37)]  # fp32 holds it


@dataclass(frozen=True)
class TrainConfig:
    """What the user asks for. The defaults are tiny's (docs/log.md, "Training recipe"); SIZE_DEFAULTS has others'."""

    size: Literal["tiny", "small", "base", "medium"] = flag(
        "tiny", "Sets the defaults below: 0.9M, 11M, 26M or 85M parameters.", positional=True)
    data: Path | None = flag(None, "Folder made by data/prepare.py, or a text, to make one of; default: the newest.")
    out: Path | None = flag(None, "Folder to write; default: a new out/DATA-SIZE, with --resume the newest.")
    resume: bool = flag(False, "Continue the run in --out; flags given here replace its own.")
    init_from: Path | None = flag(None, f"Model to fine-tune: {MODEL}.")

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
    batch_size: Annotated[int, Meta(ge=1, le=2**20)] = flag(16, "Sequences a step, over all ranks together.")
    grad_accum: Count | None = flag(1, "Parts of a rank's batch: same result, less memory; fine-tuning: all.")
    muon_lr: Rate = flag(0.02, "Learning rate of Muon, for the blocks' matrices; 0: AdamW takes them.")
    adam_lr: Rate = flag(1e-2, "Learning rate of AdamW, for embedding, head and norms.")
    weight_decay: Rate = flag(0.0, "Decoupled weight decay of Muon.")
    grad_clip: NonNegative = flag(1.0, "Largest gradient norm; 0: no clipping.")
    warmup_steps: Annotated[int, Meta(ge=0, le=10**12)] = flag(
        0, "First steps, over which the learning rates rise linearly.")
    warmdown: NonNegative = flag(0.7, "Last share of the run, over which the learning rates fall linearly to zero.")

    eval_every: Count | None = flag(None, "Steps between evaluations, which also save; default: 250, or 8 in all.")
    eval_tokens: Count = flag(100_000, "Validation tokens of an evaluation, always the same, evenly spread.")
    seed: Seed = flag(1337, "Draws the weights and the order of the data.")
    device: str = flag("auto", "auto, cpu, cuda or mps.")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "Products' format; auto: bfloat16 if hardware has it.")
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile (10 seconds); auto: for 1000 steps or more.")
    threads: Threads | None = flag(None, "CPU threads of each rank; default: as many as cores are free.")
    parallel: Literal["ddp", "fsdp"] = flag("ddp", "Each rank has the whole model (ddp) or a part of it (fsdp).")


RATES = {"muon_lr": 0.01, "adam_lr": 1.5e-3}  # measured on small; a guess for larger models
SIZE_DEFAULTS = {"tiny": {}, "small": RATES, "base": RATES, "medium": RATES}
# docs/log.md, "Fine-tuning". grad_accum None: parts_of() looks at the ranks.
FINE_TUNING = {"batch_size": 4, "grad_accum": None, "block_size": 512, "muon_lr": 0.0, "adam_lr": 1e-4,
               "warmup_steps": 5, "warmdown": 0.9, "dropout": 0.0}
FINE_TUNING_PASSES = 2
# A default run ends after so many steps or passes through the text (docs/log.md, "Length of a run")
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
    block_size: Count  # at most the text's length, and the context of the model to fine-tune
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
    if first.resume and without_help != args:
        parse(TrainConfig, DESCRIPTION, args)  # prints the help, for which no run is needed
    restarted = restart_folder(first.out)
    if restarted is not None:
        note(f"going on in {restarted}, where this launch of torchrun ({launch()}) trained before")
    out, plan, state = restarted or first.out, None, None
    if first.resume or (restarted is not None and (restarted / STATE).exists()):
        config, plan, state = resume(out or newest(Path("out"), STATE, "python train.py")[0], args, flags)
    else:
        base = defaults(first.size)
        if first.init_from is not None:
            refuse(flags, (*SHAPE, "size"), f"beside --init-from {first.init_from}, which has its own", "size")
            base = dataclasses.replace(base, **FINE_TUNING)
        config = dataclasses.replace(parse(TrainConfig, DESCRIPTION, args, base), out=out)
    if not config.muon_lr:
        refuse(flags, ["weight_decay"], "with --muon-lr 0")
    if state is None and config.init_from is not None:
        config = dataclasses.replace(config, init_from=model_folder(config.init_from))
    return config, plan, state


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
    if flags.get("block_size") == saved.block_size:
        flags["block_size"] = plan.block_size  # the text or the model may be shorter
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
        decided["data"] = data_folder(decided["data"], config.init_from)
    if "max_steps" in flags:
        config = dataclasses.replace(config, max_minutes=None)
    elif config.max_minutes:
        meta = read_meta(decided.get("data", plan.data))
        decided["max_steps"] = most_steps(config, plan.block_size, meta["train"]["tokens"])
    new = dataclasses.replace(plan, **decided | {"out": out})
    if plan.max_steps != new.max_steps > state["step"]:
        step, seconds = state["step"], state["seconds"]
        rates = [lr_scale(progress(c, p, step, seconds), step, c) for c, p in ((saved, plan), (config, new))]
        note(f"{new.max_steps} steps instead of {plan.max_steps}: the learning rates go on at {rates[1]:.0%} "
             f"of their peak instead of {rates[0]:.0%}")
    return config, new, state


# ---------------------------------------------------------------- what the flags leave open

def decide(config: TrainConfig, device: torch.device) -> Plan:
    """The plan of a new run."""
    out = new_folder(config, config.data) if config.out is not None else None  # refused before a text is prepared
    data = find_data(config)
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
    out = out or new_folder(config, data)
    return Plan(data, out, block_size, steps, dropout, dtype, compile, meta["train"]["sha256"])


def find_data(config: TrainConfig) -> Path:
    """The prepared folder: --data, or the newest under data/. With --init-from, its tokenizer is the model's."""
    model = config.init_from
    if config.data is None:
        folders = newest(Path("data"), "meta.json", prepare_command(model))
    elif config.data.is_file():
        return data_folder(config.data, model)
    elif config.data.exists():
        folders = [config.data]
    else:
        raise UserError(f"--data {config.data}: expected a text or a folder made by data/prepare.py, found neither")
    if model is None or not (model / "tokenizer.json").exists():
        return folders[0]
    for folder in folders:
        if same_tokenizer(folder, model):
            return folder
    raise another_tokenizer(folders[0], model)


def most_steps(config: TrainConfig, block_size: int, tokens: int) -> int:
    """Steps of the most passes through a text of so many tokens that do not learn it by heart."""
    passes = FINE_TUNING_PASSES if config.init_from else PASSES
    return math.ceil(passes * tokens / (config.batch_size * block_size))


def parts_of(config: TrainConfig, ranks: Ranks) -> int:
    """How many parts each rank's share of a batch is cut into; grad_accum None: single sequences."""
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
    folders = numbered(Path("out") / f"{data.name.removesuffix(f'-{name}')}-{name}")
    return next(folder for folder in folders if not folder.exists())


def shape(config: TrainConfig, meta: dict) -> GPTConfig:
    """The shape of a new model as the flags say, or that of the model to fine-tune."""
    vocab_size, eos = meta["vocab_size"], meta.get("eos")
    if config.init_from is None:
        fields = {name: getattr(config, name) for name in (*SHAPE, "block_size")}
        if config.tie_embeddings is None:  # a vocabulary of bytes makes a small matrix (docs/log.md, "Architecture")
            fields["tie_embeddings"] = vocab_size > 1024
        try:
            return GPTConfig(vocab_size, eos=eos, **fields)
        except ValueError as error:
            raise UserError(str(error)) from None
    model = config_from_hf(read_config(config.init_from), config.init_from / "config.json")
    if model.vocab_size < vocab_size:
        raise UserError(f"--init-from: the model knows {model.vocab_size} tokens, the data has {vocab_size}; "
                        f"prepare the data with {command('--tokenizer', config.init_from)}")
    if eos is not None and eos not in model.ends:  # the token that ends a text in the data also ends generated text
        model.eos = [*model.ends, eos]
    return model


def pick_dropout(parameters: int, tokens: int, passes: float) -> float:
    """The dropout of a new model, by its parameters per token of text; 0 below two passes through the text.

    docs/log.md, "Regularization".
    """
    if passes < 2:
        return 0.0
    return 0.2 if parameters > 20 * tokens else 0.1 if parameters > 2 * tokens else 0.0


# ---------------------------------------------------------------- the schedule

def lr_scale(done: float, step: int, config: TrainConfig) -> float:
    """A trapezoid (Zhai et al., 2022): up over warmup_steps, flat, down to zero over the last `warmdown` of the run.

    done: the share of the run that lies behind.
    """
    up = (step + 1) / max(1, config.warmup_steps)
    return max(0.0, min(1.0, up, (1 - done) / max(config.warmdown, 1e-12)))


def progress(config: TrainConfig, plan: Plan, step: int, seconds: float) -> float:
    """The share of the run that is done: of its steps or, where these end first, of its minutes."""
    return max(step / plan.max_steps, seconds / 60 / config.max_minutes if config.max_minutes else 0.0)
