"""What guessed tokens bring (docs/int8.md, "Several tokens in one pass"): decoding with and without, on trained models.

    python tests/bench/bench_guesses.py out/mybook-base-int8 --draft out/mybook-tiny-int8 --text mybook.txt

Plain decoding, guesses from the text itself and guesses of the draft take turns, each on the same prompts, cut from the
text, with the same seeds. They write the same tokens, which is checked. "in vain" is a text of random tokens, by a
temperature of 100.
"""

import itertools
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from report import ROOT, machine_name, publish, take_turns
from msgspec import Meta
from torch import Tensor

from generate import generate
from int8 import KernelGPT, load_quantized
from lib.checkpoint import newest_model, read_tokenizer, token_ids
from lib.cli import Count, NonNegative, Threads, UserError, flag, parse, run


def write(model: KernelGPT, prompt: Tensor, new: int, seed: int, **settings: object) -> tuple[float, Tensor, int, int]:
    """Seconds after the first token, the tokens, and how many were guessed and how many of these were right."""
    stream = generate(model, prompt, new, seed=seed, **settings)
    first = next(stream)
    start = time.perf_counter()
    tokens = torch.stack([first, *stream])
    return time.perf_counter() - start, tokens, *model.guesses


@dataclass
class GuessConfig:
    model: Path | None = flag(None, "int8 folder; default: the newest in out/.", positional=True)
    draft: Path | None = flag(None, "Smaller int8 folder with the same tokenizer.")
    text: Path = flag(ROOT / "README.md", "UTF-8 text to take prompts from.")
    prompts: Count = flag(5, "How many, evenly spread.")
    length: Count = flag(64, "Tokens of each.")
    new: Annotated[int, Meta(ge=2)] = flag(300, "Tokens to write.")
    temperatures: tuple[NonNegative, ...] = flag((0.0, 0.8, 100.0), "0: greedy; 100: in vain.")
    threads: tuple[Threads, ...] = flag((1, 2), "CPU threads.")
    out: Path = flag(Path("out/guesses"), "Folder for guesses.md and guesses.json.")


def main() -> None:
    config = parse(GuessConfig, "Decoding with guessed tokens beside decoding without.")
    folder = config.model or newest_model(Path("out"))
    model = load_quantized(folder, "owlet")
    ids = token_ids(read_tokenizer(folder), [config.text.read_text(encoding="utf-8")])[0]
    if len(ids) < config.prompts * config.length:
        raise UserError(f"--text: expected {config.prompts} x {config.length} tokens or more, got {len(ids)}")
    starts = range(0, len(ids) - config.length + 1, len(ids) // config.prompts)[:config.prompts]
    prompts = [torch.tensor([ids[start:start + config.length]]) for start in starts]
    ways = {"none": {"most_guesses": 0}, "the text": {}}
    if config.draft:
        ways["draft"] = {"draft": load_quantized(config.draft, "owlet")}
    rows = []
    for threads, temperature in itertools.product(config.threads, config.temperatures):
        torch.set_num_threads(threads)
        calls = {(name, i): partial(write, model, prompt, config.new, i, temperature=temperature, **settings)
                 for i, prompt in enumerate(prompts) for name, settings in ways.items()}
        found = {key: results[0] for key, results in take_turns(calls, 1, title=f"{threads}").items()}
        for name in ways:
            runs = [found[name, i] for i in range(len(prompts))]
            if any(not torch.equal(run[1], found["none", i][1]) for i, run in enumerate(runs)):
                raise UserError(f"guesses by {name} changed the text at temperature {temperature:g}")
            rows.append({
                "threads": threads, "temperature": temperature, "guesses": name,
                "speed": statistics.median((config.new - 1) / run[0] for run in runs),
                "ratio": statistics.median(found["none", i][0] / run[0] for i, run in enumerate(runs)),
                "guessed": sum(run[2] for run in runs), "right": sum(run[3] for run in runs)})
    for row in rows:
        row["share"] = f"{row['right'] / row['guessed']:.0%} of {row['guessed']:,}" if row["guessed"] else "-"
    draft = f", draft {config.draft.name}" if config.draft else ""
    note = f"{folder.name}{draft}; medians of {len(prompts)} texts, {config.new} tokens each; {machine_name()}"
    publish(config.out / "guesses", note, (rows, {
        "guesses by": "{guesses}", "temperature": "{temperature:g}", "threads": "{threads}", "tokens/s": "{speed:,.0f}",
        "over none": "{ratio:.2f}x", "right": "{share}"}))


if __name__ == "__main__":
    run(main)
