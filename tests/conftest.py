"""What the tests share: a small text, prepared once, and scripts run in this process or forked from one like it."""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the CPU is what these tests are about

import pytest
import torch

import train
from int8 import int8_linear_reference
from lib import cli, corpus, recipe
from lib.checkpoint import read_safetensors, read_state, save_weights, weights_of
from lib.runlog import RunLog
from model import GPT, GPTConfig

# Threads wait for each other by spinning: on a machine with other work, two can take ten times as long as one.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for scripts in processes of their own

# Half of a short run's time goes into measuring the machine's peak and drawing its curve at each evaluation.
train.peak_flops = lambda *_: 1e11
plot = RunLog.plot
RunLog.plot = lambda log: None if log.path.with_name("loss.png").is_file() else plot(log)

# A test run in the background ignores Ctrl-C, one under nohup SIGHUP; the processes it starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
TINY = {"vocab_size": 256, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="how often tests/test_chaos.py kills a training run")
    parser.addoption("--kills-seed", type=int, default=random.randrange(2**32), help="draws the moments of the kills")
    parser.addoption("--cases", type=int, default=30, help="how many cases each test of tests/test_fuzz.py draws")
    parser.addoption("--cases-seed", type=int, default=random.randrange(2**32), help="draws them")


def save_model(model: GPT, folder: Path) -> None:
    save_weights(model.state_dict(), model.config, folder)


def make_text(words: int, seed: int = 0) -> str:
    """Sentences of made-up grammar: structured enough that a small model learns something."""
    rng = random.Random(seed)
    names, verbs = ["Owl", "Fox", "Wren", "Mole", "Hare"], ["sees", "likes", "hears", "follows"]
    hours = ["one", "two", "ten"]
    sentences = []
    while words > 0:
        sentences.append(f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(names)} at {rng.choice(hours)}.")
        words -= 5
    return "\n".join(sentences) + "\n"


@pytest.fixture(autouse=True)
def notes_anew() -> None:
    """A process says the same note once; here each test is one."""
    cli.note.cache_clear()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "wood.txt"
    path.write_text(make_text(8000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder (bytes)."""
    out = tmp_path_factory.mktemp("data") / "wood"
    return corpus.prepare(corpus.PrepareConfig(input=(text_file,), out=out))


# ---------------------------------------------------------------- processes of their own

def forks() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported this module, and so torch, and what trains, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "lib.picture", "torch.utils.tensorboard"])
    with pytest.MonkeyPatch.context() as patch:  # where pytest found this module
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def free_port() -> int:
    """Below the ports that the system hands out: there a client that comes before its server may connect to itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def fork(target: Callable, *args: object, ranks: int = 1) -> list[BaseProcess]:
    """Start `ranks` processes of target(*args), with the environment that torchrun on one machine gives them."""
    port = free_port()
    processes = [forks().Process(target=_rank, args=(rank, ranks, port, target, args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, ranks: int, port: int, target: Callable, args: tuple) -> None:
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                       "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    target(*args)


def exit_codes(processes: list[BaseProcess]) -> list[int]:
    """The exit code of each process. One that has not ended after four minutes is killed."""
    for process in processes:
        process.join(240)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def fork_train(log: Path, *flags: object, ranks: int = 1, changes: str = "") -> list[BaseProcess]:
    """Start `ranks` processes of train.py; what they print goes to `log`.

    `changes` is code that runs before train.main, with rank, train, hooked and die at hand.
    """
    return fork(_train, log, changes, [str(flag) for flag in flags], ranks=ranks)


def _train(log: Path, changes: str, words: list[str]) -> None:
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = ["train.py", *words]
    exec(changes, {"rank": int(os.environ.get("RANK", 0)), "train": train, "hooked": hooked, "die": die})
    cli.run(train.main)


def end_well(processes: list[BaseProcess], log: Path) -> str:
    """What they printed, once all have ended well."""
    codes, said = exit_codes(processes), log.read_text()
    assert codes == [0] * len(processes), said
    return said


def wait_until(happens: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def hooked(function: Callable, action: Callable[[int], object]) -> Callable:
    """`function`, whose n-th call (counted from 1) calls action(n) first."""
    calls = itertools.count(1)

    def both(*args: object, **named: object) -> object:
        action(next(calls))
        return function(*args, **named)

    return both


def die(*_: object, **__: object) -> None:
    """kill -9 of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- training runs and what they leave

SMALL = ["--n-layer", "2", "--n-embd", "32", "--block-size", "32", "--batch-size", "8", "--eval-every", "10",
         "--eval-tokens", "2000", "--dtype", "float32", "--device", "cpu", "--threads", "1", "--compile", "off"]
SAME = 1e-4  # bound for losses and weights: a sum in another order differs in its last bits


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """finished("--max-steps", 20): the folder of an undisturbed run of SMALL. It is trained once and never changed."""

    @functools.cache
    def folder(*flags: object) -> Path:
        out = tmp_path_factory.mktemp("finished") / "run"
        log = out.with_name("log")
        end_well(fork_train(log, *SMALL, "--data", data, "--out", out, *flags), log)
        return out

    return folder


def losses(out: Path, name: str = "train_loss") -> dict[int, float]:
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {record["step"]: record[name] for record in records if name in record}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return weights_of(read_state(out)["tensors"])


assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # tensors, to the last bit


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """The same model and training state, to the last bit."""
    assert_same(*(read_safetensors(out / "model.safetensors")[0] for out in (a, b)))
    first, second = read_state(a), read_state(b)
    assert_same(first.pop("tensors"), second.pop("tensors"))
    assert first | {"seconds": 0, "sha256": ""} == second | {"seconds": 0, "sha256": ""}  # the clock differs


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    assert losses(a, "val_loss") == losses(b, "val_loss")
    assert_same_checkpoint(a, b)


def assert_near_run(a: Path, b: Path) -> None:
    """The same losses and weights, up to the order of sums."""
    assert losses(a) == pytest.approx(losses(b), abs=SAME)
    assert losses(a, "val_loss") == pytest.approx(losses(b, "val_loss"), abs=SAME)
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=SAME)


@pytest.fixture
def tiny() -> GPT:
    return random_model()


def random_model(seed: int = 0, std: float = 0.08, **fields: object) -> GPT:
    """A small model with nothing at a special value: no zero matrices, no norm weights of 1."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return model


def random_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def full_range(*shape: int) -> torch.Tensor:
    """int8, each -127 or 127."""
    return torch.randint(0, 2, shape).mul(254).sub(127).to(torch.int8)


def make_linear(M: int, N: int, K: int, swiglu: bool = False) -> tuple[torch.Tensor, ...]:
    """x, w, scale and residual of a plausible layer."""
    torch.manual_seed(0)
    scale = torch.rand(N) * 0.02 / K**0.5
    return torch.randn(M, K), random_int8(N, K), scale, torch.randn(M, N // 2 if swiglu else N)


def assert_equals_reference(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor,
                            residual: torch.Tensor | None = None, swiglu: bool = False) -> None:
    """y = int8_linear(x, w, scale, ...): to the last bit; with an exp in it, within what its last bits come to."""
    expected = int8_linear_reference(x, w, scale, residual, swiglu)
    if not swiglu:
        assert torch.equal(y, expected)
        return
    # ours and torch's, which differs from machine to machine, before a residual that may cancel most of it
    terms = int8_linear_reference(x, w, scale, None, swiglu).abs() + (residual.abs() if residual is not None else 0)
    difference, bound = (y - expected).abs(), 8 * torch.finfo(torch.float32).eps * terms
    assert (difference <= bound).all(), f"{(difference / bound).nan_to_num().max():.1f} times the bound"


def assert_same_choice(a: torch.Tensor, b: torch.Tensor) -> None:
    """Two ways to the same logits (T, V) choose the same tokens, but where a choice hangs by a hair:
    sums in another order differ in the last bit, and int8 can turn that into a whole step.
    """
    best, second = b.topk(2).values.unbind(-1)
    clear = best - second > 0.05 * b.std()
    assert torch.equal(a.argmax(-1)[clear], b.argmax(-1)[clear])
    assert clear.float().mean() > 0.7


def step_by_step(model: GPT, tokens: torch.Tensor, prompt: int = 0) -> torch.Tensor:
    """Logits (T - prompt, V) after each token of tokens (1, T) behind the prompt, one at a time, cached."""
    cache = model.new_cache(1, model.config.block_size)
    with torch.inference_mode():
        if prompt:
            model(tokens[:, :prompt], cache=cache)
        return torch.cat([model(tokens[:, i:i + 1], cache=cache)[0][0] for i in range(prompt, tokens.size(1))])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """script(module.main, "--flag", value) -> exit code, stdout, stderr."""

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # cli.run sets another

    def run(main: Callable[[], None], *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
        code = 0
        try:
            cli.run(main)
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


# ---------------------------------------------------------------- folders to damage, and what comes of it

@pytest.fixture(scope="session")
def checkpoint_folder(data, tmp_path_factory):
    """A checkpoint of two steps, never changed."""
    out = tmp_path_factory.mktemp("out") / "wood"
    config = recipe.TrainConfig(data=data, out=out, n_layer=1, n_embd=16, n_head=2, block_size=16, batch_size=4,
                               tie_embeddings=True, max_steps=2, eval_tokens=500, device="cpu")
    assert train.train(config, train.Ranks("cpu", threads=1)) == 0
    return out


@pytest.fixture
def folder(checkpoint_folder, tmp_path, monkeypatch):
    """A copy under out/ of the working folder, free to be damaged."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "out" / "wood")).relative_to(tmp_path)


def accepted(result: tuple[int, str, str]) -> tuple[str, str]:
    """Standard output and standard error of a script() that ended well."""
    code, out, err = result
    assert code == 0, out + err
    return out, err


def refused(result: tuple[int, str, str], *words: object) -> None:
    code, _, err = result
    assert code == 2, err
    [line] = [line for line in err.strip().splitlines() if not line.startswith("note: ")]
    for word in words:
        assert str(word) in line


def damage(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
