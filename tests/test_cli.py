"""What the user types, right and wrong: a mistake costs one line and exit code 2, and no file."""

import contextlib
import dataclasses
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import prepare
import pytest
import torch
from conftest import ROOT, damage, random_model, refused, save_model

import quantize
import sample
import train
from lib import checkpoint, corpus
from lib.cli import Count, NonNegative, Threads, UserError, flag, given, parse


def tree(root: Path) -> dict[Path, bytes | None]:
    """All files, with their contents, and folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


# ---------------------------------------------------------------- flags

@dataclasses.dataclass(frozen=True)
class Flags:
    size: Literal["tiny", "small"] = flag("tiny", "A positional.", positional=True)
    steps: Count | None = flag(None, "A range.")
    rate: NonNegative = flag(0.1, "A number.")
    out: Path | None = flag(None, "A path.")
    threads: tuple[Threads, ...] = flag((1, 2), "Several.")
    compare: bool = flag(True, "Yes or no.")
    name: str | None = flag(None, "Any text.")


@pytest.mark.parametrize(("words", "expected"), [
    ([], {}), (["small", "--steps", "3"], {"size": "small", "steps": 3}), (["--rate=.5"], {"rate": 0.5}),
    (["--rate", "1e-3"], {"rate": 0.001}), (["--threads", "1", "4"], {"threads": (1, 4)}),
    (["--out", "a"], {"out": Path("a")}), (["--no-compare"], {"compare": False}),
    (["--name=-x", "--out=null"], {"name": "-x", "out": Path("null")}), (["--out=~/x"], {"out": Path.home() / "x"})])
def test_flags_are_what_their_annotations_say(words, expected):
    assert given(Flags, args=words) == expected
    assert parse(Flags, "", words) == dataclasses.replace(Flags(), **expected)
    assert parse(Flags, "", [], default=Flags(steps=7)).steps == 7


@pytest.mark.parametrize("words", [
    "--steps 0", "--steps 1.5", "--steps x", "--steps null", "--rate nan", "--rate inf", "--rate -1", "--rate 1e999",
    "--threads 1 4097", "--out=", "--steps", "--threads", "--name", "--size x", "--stepz 1", "--compare=x", "big",
    "tiny small", "--out=--", "--name=\udcff", "--threads=--"])
def test_what_no_flag_takes_is_one_line(words):
    with pytest.raises(UserError) as refusal:
        given(Flags, args=words.split())
    named = words.split()[0 if words.startswith("--") else -1].partition("=")[0]
    assert "\n" not in str(refusal.value) and named in str(refusal.value)


# ---------------------------------------------------------------- mistakes

RUN = ["--resume", "--out", "out/wood"]
MISTAKES = {prepare.main: [
    (["--input", "nowhere.txt"], ["nowhere.txt", "nothing"]),
    (["--input", "."], ["a folder"]),
    (["--input", "book.txt", "--vocab-size", 255], ["--vocab-size", "256", "255"]),
    (["--input", "book.txt", "--val", 1.5], ["--val", "1.5"]),
    (["--input", "book.txt", "--clean", "much"], ["--clean", "much", "plain"]),
    (["--input", "book.txt", "--tokenizer", "."], ["tokenizer.json"]),
    (["--inptu", "book.txt"], ["--inptu", "--input"]),
    (["--tokenizer", "out/wood", "--vocab-size", 300], ["--vocab-size", "--tokenizer"]),
], train.main: [
    (["--block-size", 100_000], ["--block-size", "longer", "100000"]),
    (["--max-stepz", 5], ["--max-stepz"]),
    (["--max-steps", 0], ["--max-steps", ">= 1", "0"]),
    (["huge"], ["huge", "tiny"]),
    (["--batch-size", 6, "--grad-accum", 4], ["--batch-size", "multiple", "4", "6"]),
    (["--n-embd", 30, "--n-head", 4], ["n_embd", "multiple", "30"]),
    (["--n-head", 4, "--n-kv-head", 3], ["n_kv_head", "divisor", "3"]),
    (["--device", "cuda"], ["--device cuda", "none"]),
    (["--n-layer", 0], ["n_layer", "1 or more"]),
    (["--n-kv-head", -1], ["n_kv_head", "1 or more"]),
    (["--dropout", 1], ["dropout"]),
    (["--batch-size", 2**31], ["--batch-size", "1048576"]),
    (["--threads", 100_000], ["--threads", "4096"]),
    (["--parallel", "fsdp"], ["--parallel", "torchrun"]),
    (["--resume", "--out", "nowhere"], ["nowhere", checkpoint.STATE]),
    (["--init-from", "nowhere", "--n-layer", 1], ["--n-layer=1", "no effect", "nowhere"]),
    (["small", "--init-from", "out/wood"], ["train.py: small has no effect beside --init-from"]),
    *[(["--init-from", "out/wood", *flag], [flag[0].replace("--no-", "--")]) for flag in (
        ["--n-layer", 8], ["--n-head", 2], ["--n-kv-head", 1], ["--n-embd", 64], ["--no-qk-norm"],
        ["--no-tie-embeddings"])],
    (["--init-from", "out/wood", "--weight-decay", 0.1], ["--weight-decay", "--muon-lr 0"]),
    (["--out", "out/wood"], ["out/wood", "--resume"]),
    ([*RUN, "--n-layer", 8], ["n_layer", "1", "8"]),
    (["small", *RUN], ["size", "tiny", "small"]),
    *[([*RUN, *flag], [flag[0].strip("-").replace("-", "_").removeprefix("no_")]) for flag in (
        ["--block-size", 512], ["--no-qk-norm"], ["--eval-tokens", 9], ["--init-from", "out/wood"],
        ["--n-kv-head", 1])],
    *[([*flags, "--max-steps", 5, "--max-minutes", 1], ["--max-steps", "--max-minutes"]) for flags in ([], RUN)],
], sample.main: [
    (["--top-k", 0], ["top-k", "1 or more", "0"]),
    (["--max-new-tokens", 10**12], ["--max-new-tokens"]),
    (["--prompt", "\udcff"], ["--prompt", "utf-8"]),
    (["--prompt", "x" * 17], ["prompt", "16", "17"]),
    (["--prompt", "-milk"], ["--prompt", "=-"]),
    (["--prompt-file", "nowhere"], ["nowhere"]),
    (["--prompt-file", "latin1"], ["latin1", "UTF-8"]),
    (["--prompt-file", "/dev/zero"], ["/dev/zero", "at most"]),
    (["--prompt", "x", "--prompt-file", "nowhere"], ["--prompt-file"]),
    (["--chekpoint", "x"], ["--chekpoint"]),
    (["--backend", "reference"], ["--backend", "fp32"]),
    (["--dtype", "float16"], ["--dtype", "float16", "bfloat16"]),
], quantize.main: [
    *[(["--no-compare", *flag], [flag[0], "--no-compare"])
      for flag in (["--data", "x"], ["--eval-tokens", 5], ["--backend", "reference"])],
    (["--out", "out/wood"], ["out/wood", "training run"])]}
for script_main, options in {  # the message names the flag and its value
        train.main: "--max-steps=many --data=nowhere --device=tpu --muon-lr=1e+39 --adam-lr=nan --threads=0 --seed=-1",
        sample.main: "--top-p=0 --temperature=-0.5 --repetition-penalty=0 --num-samples=0 --max-new-tokens=0 "
                     "--threads=0 --seed=-1 --device=cuda --checkpoint=nowhere --backend=gpu"}.items():
    MISTAKES[script_main] += [([option], option.strip("-").split("=")) for option in options.split()]
    MISTAKES[script_main].append((["--seed", 2**64 - 1], ["--seed", str(2**63 - 1)]))


@pytest.mark.parametrize(("main", "flags", "words"), [
    pytest.param(main, flags, words, id=f"{main.__module__} {' '.join(map(str, flags))}")
    for main, rows in MISTAKES.items() for flags, words in rows])
def test_a_mistake_is_one_line(script, data, folder, main, flags, words):
    Path("book.txt").write_text("good " * 100)
    Path("latin1").write_bytes("é".encode("latin-1"))
    Path("data").mkdir()
    Path("data/wood").symlink_to(data)
    before = tree(Path())
    result = script(main, *flags)
    refused(result, *words)
    assert result[1] == "" and tree(Path()) == before


@pytest.mark.parametrize(("main", "cure"), [
    (train.main, "data/prepare.py"), (sample.main, "python train.py"), (quantize.main, "python train.py")])
def test_a_script_without_its_input_says_how_to_make_it(script, tmp_path, monkeypatch, main, cure):
    monkeypatch.chdir(tmp_path)
    refused(script(main), cure)


# ---------------------------------------------------------------- train


def test_resuming_a_finished_run_does_nothing(script, folder):
    before = tree(folder)
    code, out, _ = script(train.main, "--resume", "--out", folder)
    assert code == 0 and "2 steps already" in out
    assert tree(folder) == before


def test_train_refuses_other_data_on_resume(script, folder, text_file):
    other = corpus.prepare(corpus.PrepareConfig(input=(text_file,), out=Path("other"), val=0.3))
    before = tree(folder)
    refused(script(train.main, *RUN, "--data", other, "--max-steps", 4), "other data")
    assert tree(folder) == before


def test_train_does_not_overwrite_a_model(script, data, folder):
    (folder / checkpoint.STATE).unlink()
    refused(script(train.main, "--init-from", folder, "--data", data, "--out", folder), folder, "holds a model")


def test_a_pickle_in_place_of_the_state_is_not_run(script, folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    (folder / checkpoint.STATE).write_bytes(pickle.dumps(Bomb()))
    refused(script(train.main, "--resume", "--out", folder), checkpoint.STATE)
    assert not (tmp_path / "boom").exists()


# ---------------------------------------------------------------- sample

@pytest.mark.parametrize("main", [sample.main, quantize.main], ids=["sample", "quantize"])
def test_bad_folders_are_refused(script, folder, main):
    weights = folder / "model.safetensors"

    def check(*words: object) -> None:
        refused(script(main, "--checkpoint", folder), *words)
        assert list(folder.parent.iterdir()) == [folder]

    whole = weights.read_bytes()
    for keep in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:keep])
        check("model.safetensors")
    weights.unlink()
    check("model.safetensors")
    weights.write_bytes(whole)
    damage(folder / "config.json", rope_parameters={"rope_type": "yarn"})
    check("config.json", "rope scaling")
    damage(folder / "config.json", rope_parameters=None, hidden_size=18, head_dim=8)
    check("embed_tokens", "(256, 18)", "(256, 16)")
    (folder / "config.json").write_text("{")
    check("config.json", "JSON")
    (folder / "config.json").unlink()
    check("config.json")


def test_sample_streams_continues_and_repeats(script, folder):
    flags = ["--prompt", "Owl ", "--max-new-tokens", 40, "--seed", 3]
    code, out, err = script(sample.main, *flags)
    assert code == 0 and out.startswith("Owl ") and "fp32" in err and "seed 3" in err
    assert script(sample.main, *flags)[1] == out
    assert script(sample.main, *flags[:-1], 4)[1] != out


def test_prompts_of_files_and_pipes_are_read_as_books_are(script, folder, monkeypatch):
    flags, texts = ["--max-new-tokens", 5, "--seed", 3], []
    for name, content in ("plain", "你\nFox\n"), ("windows", "\ufeff你\r\nFox\r\n"):
        Path(name).write_bytes(content.encode())
        texts.append(script(sample.main, "--prompt-file", name, *flags)[1])
        with Path(name).open() as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            texts.append(script(sample.main, "--prompt", "-", *flags)[1])
    assert len(set(texts)) == 1 and texts[0].startswith("你\nFox\n")


def test_several_samples_differ(script, folder):
    _, out, _ = script(sample.main, "--prompt", "Fox", "--num-samples", 3, "--max-new-tokens", 30, "--temperature", 1.5)
    first, second, third = (part.split("\n", 1)[-1] for part in ("\n" + out).split("--- "))
    assert second.startswith("Fox") and third.startswith("Fox")
    assert len({first.strip(), second.strip(), third.strip()}) == 3


def test_characters_never_break(folder):
    detokenize = sample.Detokenizer(checkpoint.read_tokenizer(folder), [])
    texts = [detokenize(byte) for byte in "né€👍".encode() + b"\xff\xc3A\xe2\x82"]
    assert texts == ["n", "", "é", "", "", "€", "", "", "", "👍", "", "", "\ufffd\ufffdA", "", ""]
    assert detokenize.rest() == "\ufffd"


@pytest.mark.parametrize(("dtype", "how", "kind"), [
    ("auto", "fp32", torch.float32), ("float32", "fp32", torch.float32), ("bfloat16", "bf16", torch.bfloat16)])
def test_weights_and_arithmetic_take_the_dtype_asked_for(script, folder, dtype, how, kind):
    flags = ["--prompt", "Owl ", "--max-new-tokens", 20, "--seed", 3, "--dtype", dtype]
    code, out, err = script(sample.main, *flags)
    assert code == 0 and out.startswith("Owl ") and f", {how};" in err
    model = sample.load(folder, dtype, "auto", torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.cos.dtype == model.sin.dtype == torch.float32
    cache, tokens = model.new_cache(1, 16), torch.arange(16)[None]
    logits, _ = model(tokens, cache=cache)
    assert logits.dtype == cache.keys.dtype == kind
    exact, _ = checkpoint.load_model(folder)(tokens)
    torch.testing.assert_close(logits.float()[:, -1], exact[:, -1], atol=0.05 * exact.std().item(), rtol=0)


def test_int8_folders_sample_like_fp32_ones(script, folder):
    assert script(quantize.main, "--no-compare")[0] == 0
    code, out, err = script(sample.main, "--prompt", "Fox ", "--max-new-tokens", 20)
    assert code == 0 and out.startswith("Fox ") and "int8" in err and "wood-int8" in err
    refused(script(sample.main, "--dtype", "bfloat16"), "--dtype bfloat16", "fp32", "wood-int8")
    assert script(sample.main, "--dtype", "float32", "--max-new-tokens", 2)[0] == 0


def test_int8_folders_go_where_they_are_sent_and_overwrite_no_other(script, folder):
    before = tree(Path("out"))
    code, _, err = script(quantize.main, "--out", "small/model", "--no-compare", "--gguf")
    assert code == 0 and Path("small/model.gguf").exists(), err
    assert script(sample.main, "--checkpoint", "small/model", "--max-new-tokens", 8)[0] == 0
    assert tree(Path("out")) == before
    save_model(random_model(), Path("other"))
    refused(script(quantize.main, "--out", "other"), "other", "name another --out")
    Path("out/wood-int8").mkdir()
    Path("out/wood-int8/run.json").touch()
    refused(script(quantize.main, "--checkpoint", folder), "out/wood-int8: holds a training run")
    assert list(Path("out/wood-int8").iterdir()) == [Path("out/wood-int8/run.json")]


# ---------------------------------------------------------------- the process

@pytest.mark.parametrize("main", [prepare.main, train.main, sample.main, quantize.main], ids=lambda f: f.__module__)
def test_help(script, main):
    code, out, _ = script(main, "--help")
    assert code == 0 and "usage:" in out and "default" in out


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Writing past 20 KB fails: a disk that fills up, without filling one."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_while_saving_loses_nothing(script, data, folder, small_files_only):
    before = tree(folder)
    code, _, err = script(train.main, "--resume", "--out", folder, "--max-steps", 6, "--eval-every", 2,
                          "--threads", 1)
    assert code == 2, err
    assert "could not be written" in err.strip().splitlines()[-1]
    after = tree(folder)
    assert not list(folder.glob(".*tmp"))
    for name in (checkpoint.STATE, "model.safetensors", "config.json"):
        assert after[folder / name] == before[folder / name]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk takes root on Linux")
@pytest.mark.parametrize("megabytes", [2, 8])
def test_a_full_disk_is_one_line_and_loses_nothing(script, data, tmp_path, megabytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine may not mount a small disk")
    try:
        code, _, err = script(train.main, "--data", data, "--out", disk / "run", "--max-steps", 3, "--batch-size", 2,
                              "--block-size", 16, "--eval-tokens", 100, "--threads", 1)
        assert code == 2 and "Traceback" not in err and "could not be written" in err.splitlines()[-1], err
        assert (disk / "run" / checkpoint.STATE).exists() == (megabytes == 8)  # 7 MB, and behind it the model, 3.5 MB
        assert not (disk / "run" / "config.json").exists()
        assert not list(disk.rglob(".*.tmp"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # this process has its log open there


def test_loading_a_model_imports_no_compiler(script, folder):
    """Many operations on the meta device do, which costs a second at every start of sample.py."""
    assert script(quantize.main, "--no-compare")[0] == 0
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import int8
        from lib import checkpoint
        checkpoint.load_model({str(folder)!r})
        int8.load_quantized({str(folder.with_name("wood-int8"))!r}, "reference")
        print([name for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_ctrl_c_is_known_in_whatever_a_library_makes_of_it(script):
    """Python 3.11 turns it into a RuntimeError within __set_name__, while a class is made; C code may drop it."""
    class Field:
        def __set_name__(self, *_: object) -> None:
            signal.raise_signal(signal.SIGINT)

    def main() -> None:
        type("Class", (), {"field": Field()})

    def library(number: int = signal.SIGINT) -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ImportError("half-loaded")  # noqa: B904

    def in_c() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape")

    for interrupted in (main, library, in_c):
        code, _, err = script(interrupted)
        assert code == 130 and err.count("interrupted") == 1 and err.count("\n") == 2, err
    code, _, err = script(lambda: library(signal.SIGTERM))
    assert code == 128 + signal.SIGTERM and "half-loaded" not in err


def test_a_thread_that_cannot_write_is_a_note(script):
    def main() -> None:
        thread = threading.Thread(target=lambda: Path(__file__, "file").write_text("x"))
        thread.start()
        thread.join()

    code, _, err = script(main)
    assert code == 0 and err.count("\n") == 1
    assert err == f"note: {__file__}/file: Not a directory; going on without\n"


def test_a_reader_that_leaves_early_is_no_error(folder):
    done = subprocess.run(f"{sys.executable} {ROOT / 'sample.py'} --max-new-tokens 20000 | head -c 10",
                          shell=True, capture_output=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr

