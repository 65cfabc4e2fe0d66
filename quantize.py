"""Shrink a checkpoint to int8, and show what that costs and brings.

    python quantize.py                               the newest checkpoint under out/ -> out/NAME-int8
    python quantize.py --checkpoint out/mybook-small
    python quantize.py --gguf                        out/NAME.gguf as well, for llama.cpp and Ollama
    python quantize.py --html                        out/NAME.html as well, which opens in any browser and writes
"""

import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch
from tqdm import tqdm

from dataloader import TokenData, evaluate
from generate import generate
from int8 import has_torch_ao, load_quantized, pick_backend, save_quantized, torch_ao
from lib.checkpoint import (
    copy_companions,
    holds_model,
    is_quantized,
    load_model,
    newest_model,
    save_weights,
    stored_size,
    trained_on,
    weights_size,
)
from lib.cli import Count, Threads, UserError, command, flag, given, note, optional, parse, refuse, run
from lib.corpus import another_tokenizer, same_tokenizer
from lib.fetch import MODEL, model_folder
from lib.files import atomic_folder, beside, write_json
from lib.machine import CPUThreads, cpu_name
from lib.smooth import smooth
from model import GPT, GPTConfig

LONGEST = 1024  # the comparison's longest context, in tokens (docs/log.md, "Tests and tools")

# ---------------------------------------------------------------- what it costs, what it brings

def contenders(folder: Path, out: Path, backend: str) -> dict[str, Callable[[], GPT]]:
    """Row of the table -> how to make its model."""
    rows = {"fp32": lambda: load_model(folder)}
    if has_torch_ao():
        rows["torch.ao int8"] = lambda: torch_ao(load_model(folder))
    ours = partial(load_quantized, out, backend)
    return rows | {"owlet int8" if backend == "owlet" else f"owlet's format by {backend}": ours}


def resident_memory(row: str, folder: Path, out: Path, backend: str, threads: int) -> int:
    """Bytes that loading and running the model adds to a process; called in a fresh one."""
    torch.set_num_threads(threads)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    with tempfile.TemporaryDirectory() as small:  # code takes memory when it first runs
        model, folders = GPT(GPTConfig(n_layer=1)), (Path(small, "fp32"), Path(small, "int8"))
        save_weights(model.state_dict(), model.config, folders[0])
        save_quantized(model, folders[1])
        list(generate(contenders(*folders, backend)[row](), prompt, 8))
    memory = psutil.Process().memory_info
    before = memory().rss
    model = contenders(folder, out, backend)[row]()
    list(generate(model, prompt, min(model.config.block_size, LONGEST) // 2))
    return memory().rss - before


def tokens_per_second(models: dict[str, GPT], rounds: int, tick: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Median speed of the prompt and of decoding; the models take turns round by round."""
    config = next(iter(models.values())).config
    block = min(config.block_size, LONGEST)
    prompt = torch.randint(0, config.vocab_size, (1, block), generator=torch.Generator().manual_seed(1))
    new = min(128, block // 2)
    times = {name: {"prompt": [], "decode": []} for name in models}
    for _, (name, model) in itertools.product(range(rounds + 1), models.items()):  # the first is the warm-up
        start = time.perf_counter()
        list(generate(model, prompt, 1, temperature=0))
        middle = time.perf_counter()
        list(generate(model, prompt[:, :1], new, temperature=0, most_guesses=0))
        times[name]["prompt"].append(block / (middle - start))
        times[name]["decode"].append(new / (time.perf_counter() - middle))
        tick()
    return {name: {phase: statistics.median(values[1:]) for phase, values in of.items()} for name, of in times.items()}


def compare(folder: Path, out: Path, data: TokenData | None, backend: str, eval_tokens: int) -> dict:
    """One row a contender: size, memory, loss, speed. data None: no losses."""
    models = {name: make() for name, make in contenders(folder, out, backend).items()}
    sizes = {name: weights_size(folder) if name == "fp32" else
             stored_size(model.state_dict()) if name == "torch.ao int8" else weights_size(out)
             for name, model in models.items()}
    rows, rounds = {}, 5
    bar = tqdm(total=(rounds + 3) * len(models), desc="comparing", disable=None, leave=False)
    speeds = tokens_per_second(models, rounds, bar.update)
    for name, model in models.items():
        bits = evaluate(model, data, eval_tokens) * data.bits_per_nat if data is not None else None
        bar.update()
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            memory = fresh.apply(resident_memory, (name, folder, out, backend, torch.get_num_threads()))
        bar.update()
        base = rows["fp32"]["bits_per_byte"] if rows else bits
        rows[name] = {
            "file_bytes": sizes[name], "file_share": sizes[name] / sizes["fp32"], "memory_bytes": memory,
            "bits_per_byte": bits, "bits_per_byte_change": bits / base - 1 if data is not None else None,
            "prompt_tokens_per_second": speeds[name]["prompt"], "decode_tokens_per_second": speeds[name]["decode"]}
    bar.close()
    return {"model": folder.name, "parameters": models["fp32"].num_params(), "backend": models[name].backend,
            "threads": torch.get_num_threads(), "cpu": cpu_name(), "torch": torch.__version__, "rows": rows}


def table(result: dict) -> str:
    """The comparison as a Markdown table."""
    lines = ["| model | file MB | of fp32 | memory MB | bits/byte | change | prompt tok/s | decode tok/s |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for name, row in result["rows"].items():
        has_loss = row["bits_per_byte"] is not None
        loss = f"{row['bits_per_byte']:.4f} | {row['bits_per_byte_change']:+.3%}" if has_loss else "- | -"
        lines.append(f"| {name} | {row['file_bytes'] / 1e6:.2f} | {row['file_share']:.1%} "
                     f"| {row['memory_bytes'] / 1e6:.1f} | {loss} | {row['prompt_tokens_per_second']:,.0f} "
                     f"| {row['decode_tokens_per_second']:,.0f} |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """comparison.png: a panel a figure, a bar a model. The arrow in a title points to better."""
    from lib import picture

    panels = {"file_bytes": ("file, MB  ↓", 1e-6, "{:,.3g}"), "memory_bytes": ("memory, MB  ↓", 1e-6, "{:,.3g}"),
              "bits_per_byte_change": ("bits per byte beside fp32, %  ↓", 100, "{:+.2f}"),
              "prompt_tokens_per_second": ("prompt, tokens/s  ↑", 1, "{:,.0f}"),
              "decode_tokens_per_second": ("decode, tokens/s  ↑", 1, "{:,.0f}")}
    panels = {key: value for key, value in panels.items() if result["rows"]["fp32"][key] is not None}
    figure = picture.new_figure(2.6 * len(panels), 2.6)
    names = list(result["rows"])[::-1]  # barh begins at the bottom
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (key, (title, unit, digits)) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(names, [result["rows"][name][key] * unit for name in names],
                         color=["#08519c", *["#9ecae1", "#bdbdbd"][-(len(names) - 1):]])
        axis.bar_label(bars, fmt=digits, fontsize=8, padding=2)
        axis.margins(x=0.25)  # room for the labels
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(f"{result['model']}: {result['parameters'] / 1e6:.1f}M parameters, {result['threads']} threads")
    picture.save(figure, path)


# ---------------------------------------------------------------- command line

@dataclass
class QuantizeConfig:
    checkpoint: Path | None = flag(None, f"fp32 model: {MODEL}; default: the newest in out/.")
    out: Path | None = flag(None, "Folder to write; default: FOLDER-int8.")
    gguf: bool = flag(False, "Write a .gguf beside it: Q8_0, for llama.cpp and Ollama.")
    html: bool = flag(False, "Write a .html beside it, which opens in any browser, offline, and writes.")
    compare: bool = flag(True, "Measure size, memory, loss and speed against fp32 and torch.ao.")
    data: Path | None = flag(None, "Prepared folder to measure the loss on; default: what the model was trained on.")
    eval_tokens: Count = flag(100_000, "Validation tokens to measure the loss on, evenly spread.")
    backend: Literal["auto", "owlet", "torch.ao", "reference"] = flag("auto", "Int8 arithmetic; auto: the fastest.")
    threads: Threads | None = flag(None, "CPU threads; default: as many as cores are free.")


def validation_data(source: Path | None, folder: Path, model: GPTConfig) -> TokenData | None:
    """`source`, or else the data that the folder's model was trained on; None, with a note, if that is not here."""
    sha256 = None
    if source is None:
        source, sha256 = trained_on(folder) or (None, None)
        if source is None or not (source / "meta.json").exists():
            note("the data this model was trained on is not here, so the table has no losses; "
                 "name prepared data with --data")
            return None
    data = TokenData(source, min(model.block_size, LONGEST))
    if data.meta["vocab_size"] > model.vocab_size:
        raise UserError(f"--data {source}: has {data.meta['vocab_size']} different tokens, "
                        f"the model knows {model.vocab_size}")
    if all((place / "tokenizer.json").exists() for place in (source, folder)) and not same_tokenizer(source, folder):
        raise another_tokenizer(f"--data {source}", folder)
    if sha256 not in (None, data.meta["train"]["sha256"]):
        note(f"{source} holds other data than the model was trained on; the losses are of what it holds now")
    return data


def main() -> None:
    config = parse(QuantizeConfig, "Shrink a checkpoint to int8, and show what that costs and brings.")
    if not config.compare:
        refuse(given(QuantizeConfig), ["data", "eval_tokens", "backend"], "with --no-compare")
    threads = CPUThreads(config.threads)
    folder = model_folder(config.checkpoint) if config.checkpoint else newest_model(Path("out"), quantized=False)
    model, out = load_model(folder), config.out or beside(folder, "-int8")
    if (out / "run.json").exists() or (holds_model(out) and not is_quantized(out)):
        raise UserError(f"{out}: holds a training run or its model, which this would replace; name another --out")
    data = validation_data(config.data, folder, model.config) if config.compare else None
    backend = pick_backend(config.backend, torch.device("cpu")) if config.compare else ""
    before = weights_size(folder)
    if config.html:
        from lib.page import check_page, write_html  # needs a compiler that nothing else needs

        check_page(folder, model)
    if config.gguf:
        from lib.gguf import write_gguf  # imports a package that only this flag needs

        path = beside(config.out or folder, ".gguf")
        if config.checkpoint is not None and path.resolve() == config.checkpoint.resolve():
            raise UserError(f"--gguf: {path} is the model itself, which this would replace; name another --out")
        write_gguf(model, folder, path)
        size = path.stat().st_size
        print(f"{folder} -> {path}: {size / 1e6:.2f} MB ({size / before:.1%})")
    with atomic_folder(out, "config.json") as new:
        copy_companions(folder, new)
        options, report = smooth(model)
        save_quantized(model, new, **options)
        for name in ("comparison.json", "comparison.png"):  # they describe the model that was there
            (out / name).unlink(missing_ok=True)
    del model
    after = weights_size(out)
    print(f"{folder} -> {out}: {before / 1e6:.2f} -> {after / 1e6:.2f} MB ({after / before:.1%})\n{report}")
    if config.html:
        path = beside(config.out or folder, ".html")
        write_html(out, path)
        print(f"{out} -> {path}: {path.stat().st_size / 1e6:.2f} MB")
    if config.compare:
        threads.adapt()
        result = compare(folder, out, data, backend, config.eval_tokens)
        write_json(out / "comparison.json", result)
        with optional(out / "comparison.png"):
            plot(result, out / "comparison.png")
        print(f"\n{table(result)}\n\n{result['backend']}, {result['threads']} threads, {result['cpu']}; "
              f"also in {out}/comparison.json and .png")
    print(f"next: {command('python', 'sample.py', '--checkpoint', out)}")


if __name__ == "__main__":
    run(main)
