"""The baseline of bench_loss.py: a plain GPT-2, trained in nanoGPT's way for CPUs.

    python tests/bench/gpt2.py DATA OUT LEARNING_RATE SEED

Karpathy's recipe (github.com/karpathy/nanoGPT, README, "I only have a macbook"), in our own words: 4 layers, 4 heads,
128 wide, learned positions, LayerNorm without bias, GELU, AdamW. It imports no more than it needs, since the time to
start counts.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

LAYERS, HEADS, WIDTH = 4, 4, 128
BATCH, BLOCK, STEPS, WARMUP, EVAL_EVERY, EVAL_BATCHES = 12, 64, 2000, 100, 250, 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.attention_out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.mlp_out = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hd)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.up(self.norm_2(x))))


class GPT2(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("_out.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """idx, targets (B, T) int64 -> logits (B, T, vocab_size), mean loss in nats."""
        x = self.tokens(idx) + self.positions.weight[:idx.size(1)]
        logits = self.head(self.norm(self.blocks(x)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step: int, peak: float) -> float:
    """Linear warm-up to the peak, then a cosine down to a tenth of it."""
    if step < WARMUP:
        return peak * (step + 1) / (WARMUP + 1)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))))


def train(data: Path, out: Path, peak_rate: float, seed: int) -> None:
    """Train on a folder made by data/prepare.py. out/model.safetensors is the best of the models evaluated."""
    meta = json.loads((data / "meta.json").read_text())
    splits = {split: np.memmap(data / f"{split}.bin", dtype=meta["dtype"], mode="r") for split in ("train", "val")}
    torch.manual_seed(seed)
    model, best = GPT2(meta["vocab_size"]), math.inf

    def batch(split: str) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(splits[split]) - BLOCK, (BATCH,)).tolist()
        block = torch.from_numpy(np.stack([splits[split][s:s + BLOCK + 1] for s in starts]).astype(np.int64))
        return block[:, :-1], block[:, 1:]

    @torch.no_grad()
    def evaluate(split: str) -> float:
        return sum(model(*batch(split))[1].item() for _ in range(EVAL_BATCHES)) / EVAL_BATCHES

    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    # nanoGPT has fused on GPUs only, but it is faster on CPUs too
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}],
                                  betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak_rate)
        model(*batch("train"))[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % EVAL_EVERY == 0:
            losses = {split: evaluate(split) for split in splits}
            print(f"step {step + 1}: train {losses['train']:.4f}, validation {losses['val']:.4f}", flush=True)
            if losses["val"] < best:
                best = losses["val"]
                save_model(model, out / "model.safetensors")


if __name__ == "__main__":
    data, out, peak_rate, seed = sys.argv[1:]
    train(Path(data), Path(out), float(peak_rate), int(seed))
