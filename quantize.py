"""Shrink a checkpoint to int8, and show what that costs and brings.

    python quantize.py                               the newest checkpoint under out/ -> out/NAME-int8
    python quantize.py --checkpoint out/mybook-small

Weights: symmetric int8, one fp32 scale for each output channel. Activations: symmetric int8, one
scale for each token, found as the model runs ("dynamic"). Products are summed exactly in int32.
"""

import copy
import io
import itertools
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import atomic_path, copy_tokenizer, newest, read_config, read_state, read_tensors, write_json, write_tensors
from cli import UserError, parse, run
from model import GPT, Attention, GPTConfig, KVCache, check_tensors, generate, rope_table

try:
    import owlet_kernels  # registers torch.ops.owlet
except ImportError as error:
    owlet_kernels, why_no_kernels = None, error

Backend = Literal["owlet", "torch.ao", "reference"]

# ---------------------------------------------------------------- primitives

def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K) float -> int8 (N, K) in -127..127 and fp32 scales (N,), so that w ~ q * scale."""
    scale = w.float().abs().amax(dim=1) / 127
    q = torch.round(w.float() / torch.where(scale > 0, scale, 1.0)[:, None])  # a row of zeros has scale 0
    return q.clamp(-127, 127).to(torch.int8), scale


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) fp32 -> int8 (..., K) and one fp32 scale a token (..., 1).

    A token with NaN or infinity gets a scale that is not finite, so that its results are NaN.
    """
    amax = x.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(amax >= 1e-30, 127 / amax, 0.0)
    q = torch.round(x * inverse).nan_to_num(0.0).clamp(-127, 127).to(torch.int8)
    return q, torch.where(amax.isfinite(), amax / 127, torch.nan)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None,
                          residual: Tensor | None = None, activation: str = "none") -> Tensor:
    """What every fast path must equal: x (..., K) fp32, weight (N, K) int8, scale (N,) -> (..., N).

    activation: none, silu, or swiglu: rows 2i and 2i + 1 of the weight are gate and up of output i,
    so that y is (..., N / 2). The residual (shaped like y) is added last.
    """
    q, x_scale = quantize_tokens(x)
    total = q.double() @ weight.double().T  # float64 holds integers to 2^53: exact, and fast
    y = total.float() * x_scale * scale
    if bias is not None:
        y = y + bias
    y = activate(y, activation)
    return y if residual is None else y + residual


def activate(y: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(y)
    if activation == "swiglu":
        return F.silu(y[..., 0::2]) * y[..., 1::2]
    return y


# ---------------------------------------------------------------- the int8 model

def pick_backend(name: str) -> Backend:
    """auto: the fastest backend that is here. A missing extension is said once, with the cure."""
    has_torch_ao = "quantized::linear_dynamic" in torch._C._dispatch_get_all_op_names() if False else hasattr(torch, "ao")
    if name == "auto":
        if owlet_kernels is not None:
            return "owlet"
        print(f"note: owlet's int8 kernels are not built ({why_no_kernels}); build them with: "
              f"python setup.py build_ext", file=sys.stderr)
        return "torch.ao" if has_torch_ao else "reference"
    if name == "owlet" and owlet_kernels is None:
        raise UserError(f"--backend owlet: the kernels are not built ({why_no_kernels}); "
                        f"build them with: python setup.py build_ext")
    return name
