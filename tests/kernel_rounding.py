"""The encoder with the rounding of a bf16 kernel, and with mistakes planted on demand.

Operands of every product are rounded to bf16, sums are fp32; softmax, norms and the residual are
fp32. Q is scaled by log2(e)/sqrt(head_dim) in fp32 before it is rounded; P is rounded unnormalized.
Written apart from the reference, sequence by sequence and head by head, so that the two check each
other.
"""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels.testing import EncoderCase, EncoderProblem

DEFECTS = (
    "scale of the next power of two",
    "pad keys unmasked",
    "pad values not cleared",
    "last key dropped",
    "heads swapped",
    "head split off by one",
    "no b_q",
    "no b_v",
    "no b_o",
    "attention residual dropped",
    "feed-forward residual dropped",
    "norm with ddof=1",
    "norm eps 1e-2",
    "norm over the next power of two",
    "norms swapped",
    "one feed-forward column dropped",
    "leaky slope 0.01",
    "tanh gelu",
    "softmax sum of a row short of one key",
    "query strip stale",
    "final norm skipped on padding",
    "window shifted by one",
    "window from the other end",
    "pool ignores one position",
    "pool ignores padding",
    "candidate forgotten",
)


def emulate(problem: EncoderProblem, defect: str | None = None) -> Tensor:
    """What a correct bf16 kernel computes, or one with the defect named."""
    assert defect is None or defect in DEFECTS
    outputs = [
        _Sequence(problem, b, defect).run().to(problem.x.dtype) for b in range(len(problem.x))
    ]
    return torch.stack(outputs)


def _round(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16).float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _round(a) @ _round(b)


class _Sequence:
    def __init__(self, problem: EncoderProblem, b: int, defect: str | None) -> None:
        self.options, self.defect = problem.options, defect
        self.weights = [None if w is None else w.detach().float() for w in problem.weights]
        x = problem.x[b].float()
        valid = torch.ones(len(x), dtype=torch.bool)
        if problem.lengths is not None:
            valid[int(problem.lengths[b]) :] = False
        elif problem.key_padding_mask is not None:
            valid = problem.key_padding_mask[b] == 0  # False of bool, 0 of float
        if self.options["padding"] != "compute":
            x = x.masked_fill(~valid[:, None], 0.0)
        if problem.candidate is not None:
            c = problem.candidate[b].float()
            c = torch.zeros_like(c) if defect == "candidate forgotten" else c
            if self.options["fusion"] == "concat":
                x = torch.cat([x, c.expand(len(x), -1)], 1)
            else:
                front = self.options["order"] == "latest_first"
                own = torch.ones(1, dtype=torch.bool)
                x = torch.cat([c[None], x] if front else [x, c[None]])
                valid = torch.cat([own, valid] if front else [valid, own])
        self.x, self.valid = x, valid

    def run(self) -> Tensor:
        x, o = self.x, self.options
        for i in range(len(self.weights) // 12):
            x = self.layer(x, self.weights[12 * i : 12 * i + 12])
        if o["padding"] != "compute":
            x = x.masked_fill(~self.valid[:, None], 0.0)
        if len(self.weights) % 12:
            normed = self.norm(x, *self.weights[-2:], o["final_norm_eps"])
            if self.defect == "final norm skipped on padding":
                normed[~self.valid] = x[~self.valid]
            x = normed
        return x if o["latest_k"] is None else self.summary(x)

    def layer(self, x: Tensor, weights: list[Tensor | None]) -> Tensor:
        w_in, b_in, w_o, b_o, w_1, b_1, w_2, b_2, *norms = weights
        eps = self.options["layer_norm_eps"]
        first, second = norms[:2], norms[2:]
        if self.defect == "norms swapped":
            first, second = second, first
        if self.defect == "no b_o":
            b_o = None

        def attend(y: Tensor) -> Tensor:
            return self.linear(
                self.attention(self.linear(y, w_in, self.input_bias(b_in))), w_o, b_o
            )

        def feed_forward(y: Tensor) -> Tensor:
            hidden = self.activate(self.linear(y, w_1, b_1))
            if self.defect == "one feed-forward column dropped":
                hidden[:, -1] = 0.0
            return self.linear(hidden, w_2, b_2)

        keep_a = 0.0 if self.defect == "attention residual dropped" else 1.0
        keep_f = 0.0 if self.defect == "feed-forward residual dropped" else 1.0
        if self.options["norm_first"]:
            x = keep_a * x + attend(self.norm(x, *first, eps))
            return keep_f * x + feed_forward(self.norm(x, *second, eps))
        x = self.norm(keep_a * x + attend(x), *first, eps)
        return self.norm(keep_f * x + feed_forward(x), *second, eps)

    def linear(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        assert w is not None
        y = _product(x, w.T)
        return y if b is None else y + b

    def input_bias(self, b: Tensor | None) -> Tensor | None:
        if b is None:
            return None
        q, k, v = b.chunk(3)
        q = torch.zeros_like(q) if self.defect == "no b_q" else q
        v = torch.zeros_like(v) if self.defect == "no b_v" else v
        return torch.cat([q, k, v])

    def attention(self, qkv: Tensor) -> Tensor:
        heads = self.options["nhead"]
        q, k, v = (list(t.chunk(heads, 1)) for t in qkv.chunk(3, 1))
        if self.defect == "heads swapped":
            q = q[::-1]
        if self.defect == "head split off by one":
            v = list(qkv.chunk(3, 1)[2].roll(1, 1).chunk(heads, 1))
        outputs = [self.head(q[h], k[h], v[h]) for h in range(heads)]
        return torch.cat(outputs, 1)

    def head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dim = q.shape[1]
        if self.defect == "scale of the next power of two":
            dim = 1 << (dim - 1).bit_length()
        keys = self.valid.clone()
        if self.defect == "pad keys unmasked":
            keys[:] = True
        if self.defect == "last key dropped" and keys.any():
            keys[int(keys.nonzero()[-1])] = False
        if not keys.any():
            return torch.zeros_like(v)
        s = _product(q * (math.log2(math.e) / math.sqrt(dim)), k[keys].T)
        p = torch.exp2(s - s.amax(1, keepdim=True))
        total = p.sum(1, keepdim=True)
        if self.defect == "softmax sum of a row short of one key":
            total = total - p[:, :1] + 1e-30
        if self.defect == "pad values not cleared" and not keys.all():
            p, keys = (
                torch.cat([p, p[:, -1:]], 1),
                torch.cat([keys.nonzero(), (~keys).nonzero()[:1]]),
            )
            keys = keys[:, 0]
        y = _product(p, v[keys]) / total
        if self.defect == "query strip stale" and len(y) > 16:
            y[-1] = y[-17]
        return y

    def activate(self, x: Tensor) -> Tensor:
        kind, slope = self.options["activation"], self.options["negative_slope"]
        if kind == "relu":
            return F.relu(x)
        if kind == "leaky_relu":
            return F.leaky_relu(x, 0.01 if self.defect == "leaky slope 0.01" else slope)
        tanh = kind == "gelu_tanh" or self.defect == "tanh gelu"
        return F.gelu(x, approximate="tanh" if tanh else "none")

    def norm(self, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        width = x.shape[1]
        if self.defect == "norm eps 1e-2":
            eps = 1e-2
        divisor = width
        if self.defect == "norm over the next power of two":
            divisor = 1 << (width - 1).bit_length()
        mean = x.sum(1, keepdim=True) / divisor
        squares = (x - mean).square().sum(1, keepdim=True)
        variance = squares / (width - 1 if self.defect == "norm with ddof=1" else divisor)
        y = (x - mean) * torch.rsqrt(variance + eps)
        y = y if w is None else y * w
        return y if b is None else y + b

    def summary(self, x: Tensor) -> Tensor:
        o, k, length = self.options, self.options["latest_k"], len(x)
        where = self.valid.nonzero()[:, 0].tolist()
        if o["order"] == "latest_first":
            start = where[0] if where else 0
        else:
            start = (where[-1] if where else length - 1) - k + 1
        if self.defect == "window shifted by one":
            start += 1
        if self.defect == "window from the other end":
            start = 0 if o["order"] == "latest_last" else length - k
        slots = range(start, start + k)
        parts = [x[s] if 0 <= s < length else torch.zeros_like(x[0]) for s in slots]
        if o["pool"] == "max":
            exclude = o["padding"] == "exclude" or self.defect == "pool ignores padding"
            rows = where if exclude else list(range(length))
            if self.defect == "pool ignores one position":
                rows = rows[:-1]
            parts.append(x[rows].amax(0) if rows else torch.zeros_like(x[0]))
        return torch.cat(parts)


def negative_gelu_problem(activation: str) -> EncoderProblem:
    """A problem whose result tells the erf form of GELU from the tanh form.

    The hidden values before the activation lie around -3, where GELU is -0.004 and the two forms
    differ by a tenth of that; the feed-forward output makes most of the result.
    """
    case = EncoderCase(activation=activation, norm_first=True, scale=0.01, num_layers=1)
    problem = case.problem()
    weights = list(problem.weights)
    w_1, b_1, w_2 = weights[4:7]
    assert w_1 is not None
    assert b_1 is not None
    assert w_2 is not None
    weights[4:7] = [0.125 * w_1, torch.full_like(b_1, -3.0), 256 * w_2]
    return dataclasses.replace(problem, weights=tuple(weights))
