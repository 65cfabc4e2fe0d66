"""Prepared tokens: the files, the order of batches, and the loss over the validation text.

Which sequences a step sees depends only on (seed, step): a resumed run and every number of ranks see the same batches.
"""

import contextlib
import hashlib
import math
import sys
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NotRequired, TypedDict

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from lib.cli import UserError
from lib.distributed import Ranks
from lib.files import read_json, regular_file

Count = Annotated[int, Meta(ge=1, lt=1 << 48)]


class Split(TypedDict):
    tokens: Count
    bytes: Count  # the length of the text
    sha256: str
    mtime_ns: NotRequired[int]


class DataMeta(TypedDict):
    """meta.json. numpy sees these two dtypes alone: others would take bytes of a file for addresses."""

    vocab_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    dtype: Literal["<u2", "<u4"]
    train: Split
    val: Split
    eos: NotRequired[Annotated[int, Meta(ge=0)] | None]  # the token that ends a text
    inputs: NotRequired[list[str]]


def read_meta(folder: Path) -> DataMeta:
    """meta.json of a folder made by data/prepare.py."""
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder}: expected a folder made by data/prepare.py, found no meta.json in it")
    return read_json(folder / "meta.json", DataMeta)


class TokenData:
    """train.bin and val.bin of a prepared folder. Calls read from disk: a memory map's pages would stay resident."""

    def __init__(self, folder: Path, block_size: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.folder, self.meta = folder, read_meta(folder)
        self.block_size, self.device, self.seed = block_size, torch.device(device), seed
        self.files, self.tokens, self.dtype = {}, {}, np.dtype(self.meta["dtype"])
        for split in ("train", "val"):
            self.files[split] = open_tokens(folder / f"{split}.bin", self.meta[split], self.dtype.itemsize)
            self.tokens[split] = tokens = self.meta[split]["tokens"]
            if tokens <= block_size:
                raise UserError(f"{folder}/{split}.bin: a block of {block_size} is longer than this text of {tokens} "
                                f"tokens; expected a --block-size of at most {tokens - 1}")
        self.bits_per_nat = self.meta["val"]["tokens"] / self.meta["val"]["bytes"] / math.log(2)
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def sequences(self, split: str, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the sequences at `starts`, each (len(starts), block_size) int64."""
        file, block = self.files[split], np.empty((len(starts), self.block_size + 1), self.dtype)
        for row, start in zip(block, starts, strict=True):
            file.seek(int(start) * self.dtype.itemsize)
            if file.readinto(row) != row.nbytes:
                raise UserError(f"{file.name}: ends before token {start + len(row)}; expected {self.tokens[split]} "
                                "tokens; run data/prepare.py again")
        if len(block) and block.max() >= self.meta["vocab_size"]:
            raise UserError(f"{file.name}: expected tokens below {self.meta['vocab_size']} as meta.json says, "
                            f"got {block.max()}; run data/prepare.py again")
        block = torch.from_numpy(block.astype(np.int64))
        if self.device.type == "cuda":
            block = block.pin_memory()
        block = block.to(self.device, non_blocking=True)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def training_start(self, index: int) -> int:
        """Where training sequence `index` begins: every epoch has its own shift and permutation."""
        tokens, T = self.tokens["train"], self.block_size
        per_epoch = max(1, (tokens - T) // T)
        epoch, i = divmod(index, per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shift = rng.integers(0, min(T, tokens - per_epoch * T))
            self.epoch, self.order = epoch, shift + T * rng.permutation(per_epoch)
        return self.order[i]

    def batch(self, first: int, count: int, parts: int) -> list[tuple[Tensor, Tensor]]:
        """Training sequences first, first + 1, ... (`count` of them), in equal parts."""
        starts = np.array([self.training_start(index) for index in range(first, first + count)])
        return [self.sequences("train", part) for part in np.split(starts, parts)]

    def validation_starts(self, limit: int | None = None) -> np.ndarray:
        """Sequences that cover the validation text once, or `limit` tokens of it, evenly spread."""
        starts = np.arange(0, self.tokens["val"] - self.block_size, self.block_size)
        if limit is not None and limit < len(starts) * self.block_size:
            starts = starts[np.linspace(0, len(starts) - 1, max(1, limit // self.block_size)).astype(int)]
        return starts


def open_tokens(path: Path, meta: Split, itemsize: int) -> BinaryIO:
    """The file that meta.json describes. Raises UserError for any other. One of its size and time is not hashed."""
    found, file = regular_file(path, "a file of tokens").stat(), path.open("rb")
    if found.st_size != meta["tokens"] * itemsize:
        raise UserError(f"{path}: expected {meta['tokens']} tokens as meta.json says; run data/prepare.py again")
    if found.st_mtime_ns != meta.get("mtime_ns") and hashlib.file_digest(file, "sha256").hexdigest() != meta["sha256"]:
        raise UserError(f"{path}: expected the tokens that meta.json describes, got others; run data/prepare.py again")
    return file


# ---------------------------------------------------------------- the loss

def forward_loss(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean loss in nats a token of x, y (B, T); matrix products in dtype, weights and delicate operations in fp32."""
    # each weight is used once, so caching its copy in dtype would gain nothing
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        return model(x, y)[1]


def uncompiled() -> contextlib.AbstractContextManager:
    """Compiled blocks run as they are: compiling for other shapes than training's would not pay."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; the import alone would take a second
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@torch.no_grad()
def evaluate(model: nn.Module, data: TokenData, limit: int | None = None, ranks: Ranks | None = None,
             dtype: torch.dtype = torch.float32) -> float:
    """Mean validation loss in nats a token, of `limit` tokens; the ranks share the sequences among them."""
    starts = data.validation_starts(limit)
    # the fp32 logits of a batch take at most 128 MB (docs/log.md, "Evaluation")
    batch = max(1, min(8192, 2**25 // data.meta["vocab_size"]) // data.block_size)
    rank, world = (ranks.rank, ranks.world) if ranks is not None else (0, 1)
    was_training, total = model.training, 0.0
    model.eval()
    with uncompiled():
        for i in range(0, len(starts), batch * world):
            mine = starts[i:i + batch * world][rank::world]
            # a rank without sequences takes the first: all ranks of fsdp must run the model
            x, y = data.sequences("val", mine if len(mine) else starts[:1])
            total += forward_loss(model, x, y, dtype).item() * len(mine)
    model.train(was_training)
    return (ranks.sum(total)[0] if ranks is not None else total) / len(starts)
