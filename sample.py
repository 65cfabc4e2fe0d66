"""Text from a checkpoint folder, fp32 or int8, streamed as it is made.

    python sample.py                                 the newest checkpoint under out/
    python sample.py --prompt "Once upon a time" --num-samples 3
    echo "Once upon a time" | python sample.py --prompt -
"""

import contextlib
import io
import itertools
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from msgspec import Meta
from tokenizers import Tokenizer

from generate import generate
from int8 import Int8GPT, KernelGPT, load_quantized
from lib.checkpoint import (
    is_quantized,
    load_model,
    newest_model,
    read_config,
    read_tokenizer,
    token_ids,
    weights_size,
)
from lib.cli import Seed, Threads, UserError, command, flag, given, note, parse, run
from lib.fetch import MODEL, model_folder
from lib.files import newest
from lib.machine import CPUThreads, gpu_has_bf16, pick_device
from model import GPT


@dataclass
class SampleConfig:
    checkpoint: Path | None = flag(None, f"The model: {MODEL}; default: the newest in out/.")
    prompt: str | None = flag(None, "Text to continue; - reads it from standard input; default: a new line.")
    prompt_file: Path | None = flag(None, "UTF-8 file with the text to continue.")
    num_samples: Annotated[int, Meta(ge=1, le=10_000)] = flag(
        1, "Continuations, made together; the first is streamed.")
    max_new_tokens: Annotated[int, Meta(ge=1, le=10**7)] = flag(500, "Tokens to write.")
    temperature: float = flag(0.8, "0 always takes the likeliest token; higher is more adventurous.")
    top_k: int | None = flag(None, "Choose among the k likeliest tokens only.")
    top_p: float | None = flag(None, "Choose among the likeliest tokens that make up this probability only.")
    repetition_penalty: float = flag(1.0, "Above 1: tokens already in the context become less likely.")
    seed: Seed | None = flag(None, "Same seed, same text; default: a new one, shown at the end.")
    device: str = flag("auto", "auto, cpu, cuda or mps.")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "For fp32 folders; auto: bfloat16 on GPUs with it.")
    backend: Literal["auto", "owlet", "torch.ao", "reference"] = flag("auto", "Int8 arithmetic; auto: the fastest.")
    draft: Path | None = flag(None, "Smaller int8 model with the same tokenizer, which guesses tokens: the same text "
                             "sooner. auto: the newest in out/. Default: guesses from the text itself.")
    threads: Threads | None = flag(None, "CPU threads; default: as many as cores are free.")


def load(folder: Path, dtype: str, backend: str, device: torch.device) -> GPT | Int8GPT | KernelGPT:
    """The model of an fp32 or int8 folder, on the device."""
    if not is_quantized(folder):
        if backend != "auto":
            raise UserError(f"--backend: expected an int8 folder, as quantize.py makes one; {folder} is fp32")
        model = load_model(folder).to(device)
        if dtype == "float32" or (dtype == "auto" and not gpu_has_bf16(device)):
            return model
        for parameter in model.parameters():  # model.to would round the rotary angles as well
            parameter.data = parameter.data.bfloat16()
        return model
    if dtype == "bfloat16":
        raise UserError(f"--dtype bfloat16: expected an fp32 folder; {folder} is int8")
    if device.type == "mps":
        note("int8 models run on CPUs and CUDA; going on with the CPU")
        device = torch.device("cpu")
    return load_quantized(folder, backend, device)


def load_draft(name: Path, model: GPT, folder: Path, tokenizer: Tokenizer) -> KernelGPT | None:
    """The model that --draft names, for guesses; None, with a note, where `model` takes none."""
    if not model.new_writer:
        note("--draft: guesses are for int8 folders by owlet's kernels on a CPU; going on without")
        return None

    def fits(other: Path) -> bool:
        return (is_quantized(other) and weights_size(other) < weights_size(folder)
                and read_config(other).get("vocab_size") == model.config.vocab_size
                and read_tokenizer(other).get_vocab() == tokenizer.get_vocab())

    if name != Path("auto"):
        draft = model_folder(name)
        if not fits(draft):
            make = command("python", "quantize.py", "--checkpoint", draft)
            raise UserError(f"--draft {draft}: expected an int8 folder, smaller than {folder}, with its tokenizer"
                            + f"; make one with `{make}`" * (not is_quantized(draft)))
        return load_quantized(draft, "owlet")
    with contextlib.suppress(UserError):  # no folder at all
        for other in newest(Path("out"), "config.json", "python train.py"):
            with contextlib.suppress(UserError):  # one that cannot be read
                if fits(other):
                    return load_quantized(other, "owlet")
    note(f"--draft auto: found no int8 folder in out/ that is smaller than {folder}, with its tokenizer")
    return None


LONGEST_PROMPT = 10**7  # bytes: more than any context holds


def read_prompt(config: SampleConfig) -> str:
    """The text to continue. A file or pipe is read as prepare.py reads books: no byte order mark, newlines as \\n."""
    if config.prompt is not None and config.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: expected one of them, got both")
    if config.prompt_file is None and config.prompt != "-":
        return config.prompt or "\n"
    name = config.prompt_file or "standard input"
    with config.prompt_file.open("rb") if config.prompt_file is not None else sys.stdin.buffer as file:
        raw = file.read(LONGEST_PROMPT + 1)
    if len(raw) > LONGEST_PROMPT:
        raise UserError(f"{name}: expected a prompt of at most {LONGEST_PROMPT:,} bytes, got more")
    try:
        return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: expected UTF-8 text: {error}") from None


class Detokenizer:
    """Tokens to text, one at a time: what is returned, joined, is what `decode` makes of all of them.

    Text is held back while a later token may change it: incomplete characters, and single bytes (<0x41>), of which
    Llama's decoder takes a whole run as text or none of it. Only the tokens since the last text are decoded, behind
    those that made that text, since decoders treat the beginning of a text in another way.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens, self.said = [*prompt], len(prompt)  # the first `said` tokens are text already

    def __call__(self, token: int) -> str:
        self.tokens.append(token)
        single_byte = re.fullmatch("<0x[0-9A-F]{2}>", self.tokenizer.id_to_token(token) or "")
        if single_byte or not self.tokenizer.decode([token]):  # decode skips special tokens: they end no run
            return ""
        return self.rest(hold="\ufffd")

    def rest(self, hold: str | None = None) -> str:
        """The text of what is still held back; none if it ends with `hold`."""
        before, text = (self.tokenizer.decode(part) for part in (self.tokens[:self.said], self.tokens))
        new = text[len(before):]
        if not new or (hold is not None and new.endswith(hold)):
            return ""
        self.tokens = self.tokens[self.said:]
        self.said = len(self.tokens)
        return new


def main() -> None:
    config = parse(SampleConfig, "Text from a checkpoint folder, fp32 or int8, streamed as it is made.")
    for name in {"top_k", "top_p", "seed"} & given(SampleConfig).keys() if config.temperature == 0 else ():
        note(f"--{name.replace('_', '-')} has no effect with --temperature 0, which draws nothing")
    threads = CPUThreads(config.threads)
    device = pick_device(config.device)
    folder = model_folder(config.checkpoint) if config.checkpoint else newest_model(Path("out"))
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a checkpoint folder, found none")
    tokenizer = read_tokenizer(folder)
    text = read_prompt(config)
    [prompt] = token_ids(tokenizer, [text], special=True)
    model = load(folder, config.dtype, config.backend, device)
    for token in prompt:
        if token >= model.config.vocab_size:
            raise UserError(f"--prompt: {tokenizer.id_to_token(token)!r} is token {token}; "
                            f"the model knows {model.config.vocab_size}")
    draft = load_draft(config.draft, model, folder, tokenizer) if config.draft else None
    threads.adapt()
    seed = config.seed if config.seed is not None else torch.seed() % 2**32

    idx = torch.tensor([prompt] * config.num_samples, device=model.device).view(config.num_samples, -1)
    tokens = generate(model, idx, config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                      top_p=config.top_p, repetition_penalty=config.repetition_penalty,
                      eos=model.config.eos, seed=seed, draft=draft)
    ends = model.config.ends
    detokenize, ended = Detokenizer(tokenizer, prompt), False
    print(text, end="", flush=True)
    rows, times = [], [time.perf_counter()]
    for token in tokens:
        rows.append(token.tolist())
        times.append(time.perf_counter())
        ended = ended or rows[-1][0] in ends
        print("" if ended else detokenize(rows[-1][0]), end="", flush=True)
    print(detokenize.rest())
    for i in range(1, config.num_samples):
        detokenize = Detokenizer(tokenizer, prompt)
        row = itertools.takewhile(lambda token: token not in ends, (tokens[i] for tokens in rows))
        print(f"\n--- {i + 1} of {config.num_samples}\n{text}{''.join(map(detokenize, row))}{detokenize.rest()}")

    sys.stdout.flush()  # the text comes first where one file takes both streams
    first, rest = times[1] - times[0], times[-1] - times[1]
    pace = f"{(len(rows) - 1) * config.num_samples / rest:,.0f} tokens/s" if len(rows) > 1 else "-"
    how = f"int8 by {model.backend}" if is_quantized(folder) else (
        "bf16" if model.lm_head.weight.dtype == torch.bfloat16 else "fp32")
    guessed, right = getattr(model, "guesses", (0, 0))
    guesses = f", {right} of {guessed} guesses right" if guessed else ""
    print(f"[{folder}, {how}; prompt of {len(prompt)}: {len(prompt) * config.num_samples / first:,.0f} tokens/s; "
          f"{len(rows) * config.num_samples} new: {pace}{guesses}; seed {seed}]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
