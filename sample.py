"""Text from a checkpoint folder, fp32 or int8, streamed as it is made.

    python sample.py                                 the newest checkpoint under out/
    python sample.py --prompt "Once upon a time" --num-samples 3
    echo "Once upon a time" | python sample.py --prompt -
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from checkpoint import by_age, read_config, read_tokenizer
from cli import UserError, parse, run
from model import GPT, generate


@dataclass
class SampleConfig:
    checkpoint: Path | None = None
    """Folder to sample from; default: the newest under out/."""
    prompt: str | None = None
    """Text to continue; - reads it from standard input; default: a new line."""
    prompt_file: Path | None = None
    """UTF-8 file with the text to continue."""
    num_samples: int = 1
    """Continuations, made together; the first is streamed."""
    max_new_tokens: int = 500
    temperature: float = 0.8
    """0 always takes the likeliest token; higher is more adventurous."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = None
    """Choose among the likeliest tokens that make up this probability only."""
    repetition_penalty: float = 1.0
    """Above 1: tokens already in the context become less likely."""
    seed: int | None = None
    """Same seed, same text; default: a new one each time, shown at the end."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    backend: Literal["auto", "owlet", "torch.ao", "reference"] = "auto"
    """Who multiplies in int8; auto takes the fastest there is."""
    threads: int | None = None
    """CPU threads; default: PyTorch's choice."""


def load(folder: Path, backend: str, device: str) -> tuple[GPT, str]:
    """The model of an fp32 or int8 folder, on the device, and a word on how it computes."""
    if "quantization_config" not in read_config(folder):
        return GPT.from_pretrained(folder).to(device), "fp32"
    import quantize

    model = quantize.from_pretrained(folder, backend, device)
    return model, f"int8 by {model.backend}"


def read_prompt(config: SampleConfig) -> str:
    if config.prompt is not None and config.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: expected one of them, got both")
    try:
        if config.prompt_file is not None:
            return config.prompt_file.read_text(encoding="utf-8")
        if config.prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{config.prompt_file or 'standard input'}: expected UTF-8 text: {error}") from None
    return config.prompt or "\n"


def end_of_text(folder: Path) -> int | None:
    """The token a model of others ends its answers with (ours never end)."""
    eos = read_config(folder).get("eos_token_id")
    return eos[0] if isinstance(eos, list) else eos


def stream(tokenizer: Tokenizer, prompt: list[int]) -> Callable[[int], str]:
    """A function token -> text that holds back incomplete characters."""
    decoder = DecodeStream(skip_special_tokens=True)
    for token in prompt:  # so that the first new token is spelt as a continuation
        decoder.step(tokenizer, token)
    return lambda token: decoder.step(tokenizer, token) or ""


def main() -> None:
    config = parse(SampleConfig, "Text from a checkpoint folder, fp32 or int8, streamed as it is made.")
    for flag, value in (("num-samples", config.num_samples), ("max-new-tokens", config.max_new_tokens),
                        ("threads", config.threads or 1)):
        if value < 1:
            raise UserError(f"--{flag}: expected 1 or more, got {value}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = config.checkpoint or by_age(Path("out"), "model.safetensors", "python train.py")[0]
    tokenizer = read_tokenizer(folder)
    text = read_prompt(config)
    model, how = load(folder, config.backend, device)
    seed = config.seed if config.seed is not None else torch.seed() % 2**32
    generator = torch.Generator(device).manual_seed(seed)

    prompt = tokenizer.encode(text).ids
    idx = torch.tensor([prompt] * config.num_samples, device=device).view(config.num_samples, -1)
    tokens = generate(model, idx, config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                      top_p=config.top_p, repetition_penalty=config.repetition_penalty,
                      eos=end_of_text(folder), generator=generator)
    spell = stream(tokenizer, prompt)
    print(text, end="", flush=True)
    rows, times = [], [time.perf_counter()]
    for token in tokens:
        row = token.tolist()
        times.append(time.perf_counter())
        rows.append(row)
        print(spell(row[0]), end="", flush=True)
    print()
    for i in range(1, config.num_samples):
        spell = stream(tokenizer, prompt)
        print(f"\n--- {i + 1} of {config.num_samples}\n{text}{''.join(spell(row[i]) for row in rows)}")

    first, rest = times[1] - times[0], times[-1] - times[1]
    pace = f"{(len(rows) - 1) * config.num_samples / rest:,.0f} tokens/s" if len(rows) > 1 else "-"
    print(f"[{folder}, {how}; prompt of {len(prompt)}: {len(prompt) * config.num_samples / first:,.0f} tokens/s; "
          f"{len(rows) * config.num_samples} new: {pace}; seed {seed}]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
