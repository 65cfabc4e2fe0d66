"""From a book to tokens."""

import hashlib
import json

import numpy as np
import pytest
from conftest import make_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib import corpus
from lib.cli import UserError
from lib.corpus import PrepareConfig, clean_plain, encode, pieces, plain_markdown, train_tokenizer

BYTES = train_tokenizer([], 256)
BPE = train_tokenizer([make_text(2000)], 290)


@pytest.mark.parametrize(("text", "cleaned"), [
    ("It was late at night. Mr. Dursley slept.", "It was late at night .Mr Dursley slept ."),
    ("“Don’t!” said Harry – don't?", " Dont !said Harry dont ?"),
    ("one,two;three\n\nfour", "one two three four"),
    ("Wait... What?! Yes.", "Wait .What ?Yes ."),
    ("Dr. No met St. Nick", "Dr No met St Nick"),
    ("snake_case 42", "snake case 42"),
    ("Ça va? Où.", "Ça va ?Où ."),
], ids=range(7))
def test_plain_cleaning(text, cleaned):
    assert clean_plain(text) == cleaned


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("aZ9 .?!'’\n\r\t_-é你"), max_size=200), st.integers(1, 30))
def test_cleaning_and_encoding_in_pieces_is_that_of_the_whole(text, size):
    chunks = [text[i:i + 7] for i in range(0, len(text), 7)]
    try:
        corpus.PIECE, whole_piece = size, corpus.PIECE
        parts = list(pieces(chunks))
    finally:
        corpus.PIECE = whole_piece
    assert "".join(parts) == text
    # a run without white space may be cut anywhere, so rules are compared where there is some
    if all(part[-1:].isalnum() and parts[i + 1][:1].isspace() for i, part in enumerate(parts[:-1])):
        assert "".join(map(clean_plain, parts)) == clean_plain(text)
        assert encode(BPE, parts).tolist() == BPE.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("é\u200d👩‍👩‍👧\r\n\t  x")
def test_any_text_survives(text):
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode(encode(tokenizer, [text]).tolist(), skip_special_tokens=False) == text
    assert encode(BYTES, [text]).tolist() == list(text.encode()) == BYTES.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(st.binary())
def test_any_bytes_decode(raw):
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode(list(raw)) == raw.decode("utf-8", errors="replace")


def test_bpe_ids_are_the_bytes_and_then_merges():
    assert BPE.get_vocab_size() == 290
    ids = encode(BPE, [make_text(100, seed=9)])
    assert ids.max() > 255
    assert len(ids) < 0.5 * len(make_text(100, seed=9))
    assert encode(BPE, ["\x00ÿ"]).tolist() == [0, 0xC3, 0xBF]


def test_markdown_becomes_plain():
    text = "# Hamlet\n\n### SCENE I. A _platform_.\n\n**BERNARDO**  \nWho's there?  \n\n_\\[Sings]_  \n"
    assert plain_markdown(text) == "Hamlet\n\nSCENE I. A platform.\n\nBERNARDO:\nWho's there?\n\n[Sings]\n"


@pytest.mark.parametrize("vocab_size", [256, 300])
def test_prepared_folder(text_file, tmp_path, vocab_size):
    twice = (text_file, text_file)
    out = corpus.prepare(PrepareConfig(input=twice, out=tmp_path / "d", vocab_size=vocab_size, val=0.2))
    meta = json.loads((out / "meta.json").read_text())
    text = f"{text_file.read_text()}\n{text_file.read_text()}"
    tokenizer = corpus.read_tokenizer(out)
    joined = ""
    for split in ("train", "val"):
        raw = (out / f"{split}.bin").read_bytes()
        tokens = np.frombuffer(raw, dtype=meta["dtype"])
        part = tokenizer.decode(tokens.tolist())
        joined += part
        assert meta[split] == {"tokens": len(tokens), "bytes": len(part.encode()),
                               "sha256": hashlib.sha256(raw).hexdigest(),
                               "mtime_ns": (out / f"{split}.bin").stat().st_mtime_ns}
    assert joined == text
    assert meta["vocab_size"] == tokenizer.get_vocab_size() == vocab_size
    assert meta["val"]["bytes"] == pytest.approx(0.2 * len(text), abs=2)
    tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
    assert meta["bytes_per_token"] == pytest.approx(len(text.encode()) / tokens)
    assert sorted(path.name for path in out.iterdir()) == [
        "meta.json", "tokenizer.json", "tokenizer_config.json", "train.bin", "val.bin"]


def test_large_vocabularies_take_four_bytes(text_file, tmp_path, monkeypatch):
    wide = corpus.train_tokenizer([], 256)
    wide.add_tokens([f"<{i}>" for i in range(1 << 16)])
    wide.save(str(tmp_path / "tokenizer.json"))
    out = corpus.prepare(PrepareConfig(input=(text_file,), out=tmp_path / "d", tokenizer=tmp_path))
    meta = json.loads((out / "meta.json").read_text())
    assert meta["dtype"] == "<u4"
    assert np.fromfile(out / "train.bin", "<u4")[:9].tolist() == list(text_file.read_bytes()[:9])


def test_cleaning_keeps_the_marks_of_a_texts_end(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("A.<|endoftext|>b! " * 50)
    out = corpus.prepare(PrepareConfig(input=(path,), out=tmp_path / "d", clean="plain"))
    ids = np.fromfile(out / "train.bin", "<u2").tolist()
    assert ids[:8] == [*b"A .", 256, *b"b !A"] and json.loads((out / "meta.json").read_text())["eos"] == 256


def test_the_split_does_not_cut_a_character(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("日本語" * 50, encoding="utf-8")
    for val in (0.1, 0.11, 0.12, 0.13):
        out = corpus.prepare(PrepareConfig(input=(path,), out=tmp_path / "d", val=val))
        for split in ("train", "val"):
            np.fromfile(out / f"{split}.bin", "<u2").astype(np.uint8).tobytes().decode("utf-8")


def test_newlines_and_marks_at_any_piece_boundary(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffé\r\nb\rc\n\r\n".encode())
    for size in range(1, 12):
        monkeypatch.setattr(corpus, "PIECE", size)
        assert "".join(corpus.read_text(path)) == "é\nb\nc\n\n"


@pytest.mark.parametrize(("content", "message"), [
    (b"", "empty"), (b"abc\0def", "binary.*zero byte at 3"), (b"abc\xff", "UTF-8.*0xff.*near 3"),
    ("déjà".encode("latin-1"), "UTF-8"), (b"cut \xe4\xbd", "UTF-8"), ("text".encode("utf-16"), "UTF-8.*UTF-16"),
    ("text".encode("utf-16-be"), "zero byte"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (b"x", "too few"),
], ids=["empty", "binary", "byte", "latin1", "cut", "utf16", "utf16be", "lfs", "short"])
def test_bad_text_is_refused_and_nothing_stays_behind(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        corpus.prepare(PrepareConfig(input=(path,), out=tmp_path / "d"))
    assert "\n" not in str(error.value) and ("bad.txt: " in str(error.value) or message == "too few")
    assert not (tmp_path / "d").exists()


def test_a_refused_text_leaves_earlier_data_alone(data, tmp_path, text_file):
    out = corpus.prepare(PrepareConfig(input=(text_file,), out=tmp_path / "d"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "bad").write_bytes(b"\0")
    with pytest.raises(UserError):
        corpus.prepare(PrepareConfig(input=(text_file, tmp_path / "bad"), out=out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

