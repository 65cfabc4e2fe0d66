"""owlet's int8 beside that of others: the same random weights through every engine, on the CPU.

    pip install -r requirements-peers.txt
    python tests/bench/bench_peers.py                              base and medium, on 1 and on 2 threads
    python tests/bench/bench_peers.py --sizes base --engines owlet llama.cpp-Q8_0 --rounds 9

Each engine is a process of its own, bound to as many cores as it has threads. Between its turns it is stopped
(SIGSTOP): threads that wait by spinning do not disturb another engine, and no engine waits in another way than it does
for its users. What --out holds from an earlier run (models, converted files) is used again; remove it to start afresh.
"""

import itertools
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from report import CORES, GPT2_VOCAB, Remote, machine_name, picture, publish, random_model, summary, take_turns
from engines import ENGINES
from msgspec import Meta
from tokenizers import models

from lib.checkpoint import load_model, save_weights
from lib.cli import Count, UserError, flag, parse, run
from lib.corpus import BYTES, train_tokenizer
from lib.files import beside, write_json
from model import GPT

SHORT, NEW, LONG = 32, 200, 512  # tokens: the prompt before decoding, those decoded, the prompt that is timed
WRONG = 1.0  # an engine as far off as this runs another model; 4 bits, hardest for random weights, come to 0.6


class Worker:
    """An engine in a process of its own, and its row of the table. It runs only while it works on a request."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name, self.folder, self.threads, self.remote = name, folder, threads, None
        self.row = {"size": folder.name, "threads": threads, "engine": name}
        self.speeds = {"decode": [], "prompt": []}  # tokens a second, one value a round

    def turn(self, reference: GPT, ids: list[int]) -> None:
        """The first turn starts, checks and warms up the engine, the others measure it. An error is the last turn."""
        if "error" in self.row:
            return
        try:
            if self.remote is None:
                self.remote = Remote(partial(ENGINES[self.name], self.folder, self.threads), CORES[:self.threads],
                                     {"OMP_NUM_THREADS": str(self.threads)}, beside(self.folder, f"-{self.name}.log"))
                self.row |= self.ask("about") | check(self, reference, ids[:SHORT])
                self.ask("timed", ids, 1)
            else:
                self.speeds["decode"].append((NEW - 1) / self.ask("timed", ids[:SHORT], NEW)["decode"])
                self.speeds["prompt"].append(LONG / self.ask("timed", ids, 1)["prompt"])
        except UserError as error:
            self.row["error"] = str(error)

    def ask(self, method: str, *args: object) -> Any:
        os.kill(self.remote.process.pid, signal.SIGCONT)
        self.remote.ask(method, *args)
        answer = self.remote.answer()
        os.kill(self.remote.process.pid, signal.SIGSTOP)
        return answer

    def close(self) -> None:
        if self.remote is not None and self.remote.process.is_alive():
            os.kill(self.remote.process.pid, signal.SIGCONT)
            self.remote.close()


# ---------------------------------------------------------------- the comparison

def make_checkpoint(size: str, vocab_size: int, out: Path) -> Path:
    """An fp32 folder of random weights, in which the blocks count for more than the embedding."""
    folder = out / size
    if (folder / "config.json").exists():
        return folder
    pairs = list(itertools.islice(itertools.product(BYTES, repeat=2), vocab_size - len(BYTES)))
    vocab = [*BYTES, *map("".join, pairs)]
    tokenizer = train_tokenizer((), len(BYTES))
    tokenizer.model = models.BPE(vocab={text: token for token, text in enumerate(vocab)}, merges=pairs)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), vocab[0])  # CTranslate2 needs them
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special)
    model = random_model(size, vocab_size, std=0.04)
    save_weights(model.state_dict(), model.config, folder)
    return folder


@torch.inference_mode()
def check(worker: Worker, reference: GPT, prompt: list[int]) -> dict[str, float]:
    """How far off an engine is: its logits relative to fp32's, and, for the tokens it decodes, how far fp32's logit of
    a token is below its highest, in standard deviations of the logits (about 4 for random tokens).
    """
    tokens = worker.ask("timed", prompt, NEW)["tokens"]
    if len(tokens) != NEW:
        raise UserError(f"decoded {len(tokens)} tokens instead of {NEW}")
    logits = torch.from_numpy(worker.ask("logits", prompt))
    exact = reference(torch.tensor([prompt + tokens]))[0][0, len(prompt) - 1:-1]  # (NEW, V)
    chosen = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    off = {"logits_off": ((logits - exact[0]).norm() / exact[0].norm()).item(),
           "choices_off": ((exact.amax(1) - chosen) / exact.std(1)).mean().item()}
    if not max(off.values()) < WRONG:
        raise UserError(f"computes something else: {off}")
    return off


def compare(folder: Path, threads: int, names: tuple[str, ...], rounds: int) -> list[dict]:
    """A row for each engine: its speeds, or the error for which it has none."""
    reference = load_model(folder)
    ids = torch.randint(reference.config.vocab_size, (LONG,), generator=torch.Generator().manual_seed(1)).tolist()
    workers = [Worker(name, folder, threads) for name in names]
    try:
        take_turns({worker.name: partial(worker.turn, reference, ids) for worker in workers}, rounds + 1, warmup=0,
                   title=f"{folder.name}, {threads} threads")
    finally:
        for worker in workers:
            worker.close()
    for row, speeds in ((worker.row, worker.speeds) for worker in workers if "error" not in worker.row):
        row |= {phase: summary(values) for phase, values in speeds.items()}
        row["bandwidth"] = row["decode"]["median"] * reference.num_params() / 1e9
    return [worker.row for worker in workers]


# ---------------------------------------------------------------- report

def plot(rows: list[dict], title: str, path: Path) -> None:
    """A row of panels for each size, decoding and prompt; a bar for each engine and number of threads."""
    sizes, threads, engines = (list(dict.fromkeys(row[key] for row in rows)) for key in ("size", "threads", "engine"))
    height = 1 + 0.22 * len(engines) * len(threads)
    with picture(path, title, (11, height * len(sizes)), (len(sizes), 2)) as axes:
        for axis, (size, phase) in zip(axes.flat, itertools.product(sizes, ("decode", "prompt")), strict=True):
            for i, count in enumerate(threads):
                shown = [row for row in rows if (row["size"], row["threads"]) == (size, count)]
                speeds = [row[phase]["median"] if phase in row else 0 for row in shown]
                places = np.arange(len(engines)) + 0.8 * (i + 0.5) / len(threads)
                bars = axis.barh(places, speeds, 0.8 / len(threads), label=f"{count} thread{'s' * (count > 1)}",
                                 color="#08519c", alpha=1 - 0.6 * i / len(threads))
                axis.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
            axis.set_yticks(np.arange(len(engines)) + 0.4, engines, fontsize=8)
            axis.invert_yaxis()
            axis.set_title(f"{size}: {phase}, tokens/s", fontsize=10)


# ---------------------------------------------------------------- command line

@dataclass
class PeersConfig:
    sizes: tuple[Literal["base", "medium"], ...] = flag(
        ("base", "medium"), "Models of random weights: base with a vocabulary of 256, medium with one of 50,257.")
    threads: tuple[Annotated[int, Meta(ge=1, le=len(CORES))], ...] = flag(
        tuple(range(1, min(2, len(CORES)) + 1)),
        "CPU threads, and cores to run on; each number is measured on its own.")
    rounds: Count = flag(5, "Turns of each engine that count; one more is the warm-up.")
    engines: tuple[Literal[tuple(ENGINES)], ...] = flag(tuple(ENGINES), "Engines to compare.")
    out: Path = flag(Path("out/peers"), "Folder for the models, converted for each engine, and for peers.*.")


def main() -> None:
    config = parse(PeersConfig, "owlet's int8 beside that of others: the same random weights through every engine.")
    if not CORES:
        raise UserError("needs Linux, which can bind a process to its cores")
    rows = []
    for size in config.sizes:
        folder = make_checkpoint(size, GPT2_VOCAB if size == "medium" else 256, config.out)
        for threads in config.threads:
            rows += compare(folder, threads, config.engines, config.rounds)
    measured = [row for row in rows if "error" not in row]
    errors = {f"{row['engine']}, {row['size']}: {row['error']}\n\n": None for row in rows if "error" in row}
    versions = {f"{row['engine']} {row['version']}": None for row in measured}
    note = (f"{''.join(errors)}{machine_name()}; {config.rounds} rounds, medians and the value farthest from them; "
            f"decode: {NEW} tokens after {SHORT}, prompt: {LONG}; GB/s are of one byte a weight\n"
            f"{', '.join(versions)}\nwhat the engines printed is in {config.out}/*.log")
    plot(rows, machine_name(), config.out / "peers.png")
    publish(config.out / "peers", note, (measured, {
        "engine": "{engine}", "size": "{size}", "threads": "{threads}", "file MB": "{megabytes:.1f}",
        "logits off": "{logits_off:.2%}", "choices off": "{choices_off:.4f}",
        "decode tok/s": "{decode[median]:,.0f} ±{decode[spread]:.0%}", "GB/s": "{bandwidth:.1f}",
        "prompt tok/s": "{prompt[median]:,.0f} ±{prompt[spread]:.0%}"}))


if __name__ == "__main__":
    run(main)
