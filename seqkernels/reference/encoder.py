"""Transformer encoder with fusion, padding and summary options, in plain PyTorch.

Layer (``norm_first=False``), with ``h`` the attention heads of width ``d = D / nhead``::

    q, k, v = x W_in^T + b_in;   a = softmax(q k^T / sqrt(d)) v     over valid keys only
    x = norm1(x + a W_o^T + b_o);   x = norm2(x + act(x W_1^T + b_1) W_2^T + b_2)

Letters: B sequences, L events, L' tokens the encoder sees, E event width, C candidate width,
D model width, F feed-forward width, k latest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels.options import ENCODER_CHOICES, check_choice
from seqkernels.reference.resilient_batch_norm import activate

_PER_LAYER = 12

#: A floating padding mask ignores where it is not above this. The weight of such a key, relative
#: to one that is not ignored, is 0 in every floating dtype; -10000 rounded to bf16 counts too.
IGNORED_BELOW = -9000.0


def encoder(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    nhead: int,
    activation: str = "relu",
    negative_slope: float = 0.01,
    norm_first: bool = False,
    layer_norm_eps: float = 1e-5,
    final_norm_eps: float = 1e-5,
    fusion: str = "none",
    padding: str = "zero",
    order: str = "latest_first",
    latest_k: int | None = None,
    pool: str = "none",
) -> Tensor:
    """Encode sequences of events, all of them or their summary, in the dtype of ``x``.

    Parameters
    ----------
    x : Tensor
        [B, L, E], any floating dtype. The computation runs in this dtype.
    candidate : Tensor or None
        [B, C]. ``None`` with ``fusion="none"``.
    weights : sequence of Tensor or None
        Twelve per layer, named as in ``torch.nn.TransformerEncoderLayer.state_dict()``:
        ``self_attn.in_proj_weight`` [3D, D], ``self_attn.in_proj_bias`` [3D],
        ``self_attn.out_proj.weight`` [D, D], ``self_attn.out_proj.bias`` [D],
        ``linear1.weight`` [F, D], ``linear1.bias`` [F], ``linear2.weight`` [D, F],
        ``linear2.bias`` [D], ``norm1.weight``, ``norm1.bias``, ``norm2.weight``, ``norm2.bias``
        [D]; then, if there is a final norm, its weight and bias [D]. Biases and norm weights may
        be ``None``. They are cast to the dtype of ``x``.
    key_padding_mask : Tensor, optional
        [B, L], bool (True: ignore) or floating (-9000 or less: ignore; any other value is added to
        the scores of that key).
    lengths : Tensor, optional
        [B], integers: the first ``lengths[b]`` events are valid. At most one of the two.
    nhead : int
        Number of heads, a divisor of D.
    activation : str
        ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"leaky_relu"``.
    negative_slope : float
        Of ``"leaky_relu"``.
    norm_first : bool
        Normalize before attention and feed-forward instead of after the residual sums.
    layer_norm_eps, final_norm_eps : float
        Epsilon of the norms in the layers and of the final norm.
    fusion : str
        ``"none"``: D = E. ``"concat"``: each token is [event ; candidate], D = E + C.
        ``"append"``: the candidate is one more token, C = E = D, never masked, the most recent
        one: position 0 for ``order="latest_first"``, else position L.
    padding : str
        ``"zero"``: padded positions leave the last layer as 0, to which the final norm, if any,
        is then applied. ``"compute"``: padded positions are queries like any other, never keys.
        ``"exclude"``: as ``"zero"``, and they do not enter the pool, which is 0 where a sequence
        has no valid position. Needs ``pool="max"``. ``"stock"``: what
        ``torch.nn.TransformerEncoder`` decides per batch: ``"zero"`` if every sequence is padded
        at its end only, else ``"compute"``. Needs ``fusion="none"`` and ``latest_k=None``.
    order : str
        ``"latest_first"`` or ``"latest_last"``: the end of the sequence that is most recent.
    latest_k : int or None
        ``None``: the output is the whole sequence. Else the k tokens starting at the first valid
        position (``"latest_first"``; at 0 if none is valid), or ending at the last valid one
        (``"latest_last"``; at L' - 1 if none is valid). Slots outside the sequence are 0.
    pool : str
        ``"max"`` over all L' positions (see ``padding``), or ``"none"``. Needs ``latest_k``.

    Returns
    -------
    Tensor
        [B, L', D] with L' = L, or L + 1 with ``fusion="append"``; with ``latest_k`` given
        [B, latest_k * D + (D if pool == "max" else 0)]: the window in sequence order, then the
        pool. Without tokens (L' = 0) a summary is 0.

    Raises
    ------
    ValueError
        For an option that is not one of those above, options that exclude each other, missing
        projections, a mask or lengths of the wrong shape, or lengths outside [0, L].

    Notes
    -----
    A query with no valid key has attention output 0 before the output projection. NaN or
    infinity in a padded slot stays in its slot: keys and values there are replaced, not
    multiplied by zero.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> weights = list(layer.state_dict().values())
    >>> x, lengths = torch.randn(3, 5, 8), torch.tensor([5, 2, 0])
    >>> encoder(x, None, weights, lengths=lengths, nhead=2).shape
    torch.Size([3, 5, 8])
    >>> encoder(x, None, weights, lengths=lengths, nhead=2, latest_k=2, pool="max").shape
    torch.Size([3, 24])
    """
    chosen = {
        "activation": activation,
        "fusion": fusion,
        "padding": padding,
        "order": order,
        "pool": pool,
    }
    for name, value in chosen.items():
        check_choice(f"encoder: {name}", value, ENCODER_CHOICES[name])
    _check_combination(candidate, fusion, padding, latest_k, pool)

    valid = valid_positions(x, key_padding_mask, lengths)  # [B, L]
    cleared = _cleared(valid, padding)  # [B, L]
    if cleared is not None:
        # Nothing of a padded slot is read, so that its NaN cannot reach a gradient either.
        x = x.masked_fill(cleared.unsqueeze(-1), 0.0)
    bias = None  # [B, L], added to the scores of each key
    if key_padding_mask is not None and key_padding_mask.is_floating_point():
        bias = key_padding_mask.masked_fill(~valid, 0.0)
    tokens, valid = fuse(x, candidate, valid, fusion, order)  # [B, L', D], [B, L']
    if bias is not None and fusion == "append":
        bias = F.pad(bias, (1, 0) if order == "latest_first" else (0, 1))

    cast = [None if w is None else w.to(tokens.dtype) for w in weights]
    num_layers, extra = divmod(len(cast), _PER_LAYER)
    if extra not in (0, 2):
        raise ValueError(
            f"encoder: weights: expected 12 per layer and at most two more, got {len(cast)}"
        )
    if tokens.shape[-1] % nhead:
        raise ValueError(f"encoder: nhead: expected a divisor of {tokens.shape[-1]}, got {nhead}")
    for i in range(num_layers):
        tokens = _layer(
            tokens,
            valid,
            bias,
            cast[i * _PER_LAYER : (i + 1) * _PER_LAYER],
            nhead,
            activation,
            negative_slope,
            norm_first,
            layer_norm_eps,
        )
    cleared = _cleared(valid, padding)  # [B, L']
    if cleared is not None:
        tokens = tokens.masked_fill(cleared.unsqueeze(-1), 0.0)
    if extra:
        tokens = _norm(tokens, cast[-2], cast[-1], final_norm_eps)

    if latest_k is None:
        return tokens
    if not tokens.shape[1]:
        return tokens.sum(1).repeat(1, latest_k + (pool == "max"))  # zeros, with a gradient
    return summarize(tokens, valid, padding, order, latest_k, pool)


def _check_combination(
    candidate: Tensor | None, fusion: str, padding: str, latest_k: int | None, pool: str
) -> None:
    if (candidate is None) != (fusion == "none"):
        expected = "None" if fusion == "none" else "a tensor"
        got = "None" if candidate is None else f"a tensor of shape {tuple(candidate.shape)}"
        raise ValueError(
            f"encoder: candidate: expected {expected} for fusion={fusion!r}, got {got}"
        )
    if latest_k is None and pool != "none":
        raise ValueError(f"encoder: pool: expected 'none' without latest_k, got {pool!r}")
    if latest_k is not None and latest_k < (0 if pool == "max" else 1):
        low = 0 if pool == "max" else 1
        raise ValueError(
            f"encoder: latest_k: expected at least {low} with pool={pool!r}, got {latest_k}"
        )
    if padding == "exclude" and pool != "max":
        raise ValueError(f"encoder: padding: 'exclude' expected pool='max', got pool={pool!r}")
    if padding == "stock" and (fusion != "none" or latest_k is not None):
        raise ValueError("encoder: padding: 'stock' expected fusion='none' and latest_k=None")


def _cleared(valid: Tensor, padding: str) -> Tensor | None:
    """[B, L] bool: the positions that leave the last layer as 0; None for no position."""
    if padding == "compute":
        return None
    if padding == "stock":
        before_a_valid_one = ((~valid).cumsum(1) > 0) & valid
        return ~valid & ~before_a_valid_one.any()
    return ~valid


def valid_positions(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """[B, L] bool, True where an event is to be attended to."""
    batch, length = x.shape[:2]
    if mask is not None and lengths is not None:
        raise ValueError("encoder: lengths: expected None beside key_padding_mask, got a tensor")
    if lengths is not None:
        if lengths.shape != (batch,):
            raise ValueError(
                f"encoder: lengths: expected shape ({batch},), got {tuple(lengths.shape)}"
            )
        if bool(((lengths < 0) | (lengths > length)).any()):
            raise ValueError(
                f"encoder: lengths: expected values in [0, {length}], "
                f"got {int(lengths.min())} to {int(lengths.max())}"
            )
        return torch.arange(length, device=x.device) < lengths.unsqueeze(-1)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=x.device)
    if mask.shape != (batch, length):
        raise ValueError(
            f"encoder: key_padding_mask: expected shape {(batch, length)}, got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return ~mask
    return ~(mask <= IGNORED_BELOW)  # so that NaN is kept, and seen in the result


def fuse(
    x: Tensor, candidate: Tensor | None, valid: Tensor, fusion: str, order: str
) -> tuple[Tensor, Tensor]:
    """Tokens [B, L', D] the encoder sees, and which of them are valid [B, L']."""
    if candidate is None:
        return x, valid
    if fusion == "concat":
        every = candidate.unsqueeze(1).expand(-1, x.shape[1], -1)
        return torch.cat([x, every], dim=-1), valid
    token, present = candidate.unsqueeze(1), valid.new_ones(valid.shape[0], 1)
    if order == "latest_first":
        return torch.cat([token, x], dim=1), torch.cat([present, valid], dim=1)
    return torch.cat([x, token], dim=1), torch.cat([valid, present], dim=1)


def _layer(
    x: Tensor,
    valid: Tensor,
    bias: Tensor | None,
    weights: Sequence[Tensor | None],
    nhead: int,
    activation: str,
    negative_slope: float,
    norm_first: bool,
    eps: float,
) -> Tensor:
    """One layer; x [B, L, D], valid and bias [B, L]."""
    w_in, b_in, w_out, b_out, w1, b1, w2, b2, g1, c1, g2, c2 = weights

    def attention(y: Tensor) -> Tensor:
        return _attention(_linear(y, w_in, b_in), valid, bias, nhead)

    if norm_first:
        x = x + _linear(attention(_norm(x, g1, c1, eps)), w_out, b_out)
        y = _norm(x, g2, c2, eps)
        return x + _linear(
            activate("encoder", _linear(y, w1, b1), activation, negative_slope), w2, b2
        )
    return finish_layer(x, attention(x), weights, activation, negative_slope, eps)


def finish_layer(
    x: Tensor,
    attended: Tensor,
    weights: Sequence[Tensor | None],
    activation: str,
    negative_slope: float,
    eps: float,
) -> Tensor:
    """What follows attention in a post-norm layer; x and attended [B, L, D]."""
    _, _, w_out, b_out, w1, b1, w2, b2, g1, c1, g2, c2 = (
        None if w is None else w.to(x.dtype) for w in weights
    )
    x = _norm(x + _linear(attended, w_out, b_out), g1, c1, eps)
    y = _linear(activate("encoder", _linear(x, w1, b1), activation, negative_slope), w2, b2)
    return _norm(x + y, g2, c2, eps)


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("encoder: weights: expected a tensor for every projection, got None")
    return F.linear(x, weight, bias)


def _attention(qkv: Tensor, valid: Tensor, bias: Tensor | None, nhead: int) -> Tensor:
    """Softmax attention over valid keys; qkv [B, L, 3D] -> [B, L, D]."""
    batch, length, width = qkv.shape
    head_dim = width // (3 * nhead)
    q, k, v = qkv.view(batch, length, 3, nhead, head_dim).permute(2, 0, 3, 1, 4)  # [B, h, L, d]
    hidden = ~valid[:, None, :, None]  # [B, 1, L, 1]
    k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)

    ignored = ~valid[:, None, None, :]  # [B, 1, 1, L]
    scores = (q @ k.transpose(-2, -1)) * head_dim**-0.5  # [B, h, L, L]
    if bias is not None:
        scores = scores + bias[:, None, None, :].to(scores.dtype)
    # Where every key is ignored a large finite score keeps the softmax finite; its weights are
    # cleared below, so that such a query gets 0 and no gradient of it is NaN.
    lowest = torch.where(ignored.all(-1, keepdim=True), 0.0, float("-inf")).to(scores.dtype)
    p = torch.where(ignored, lowest, scores).softmax(-1).masked_fill(ignored, 0.0)
    mixed: Tensor = p @ v  # [B, h, L, d]
    return mixed.transpose(1, 2).reshape(batch, length, nhead * head_dim)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def summarize(
    tokens: Tensor, valid: Tensor, padding: str, order: str, latest_k: int, pool: str
) -> Tensor:
    """[latest k ; pool] of the encoded tokens; [B, L', D], valid [B, L'] -> [B, out]."""
    parts = [_latest(tokens, valid, latest_k, order)]
    if pool == "max":
        parts.append(_max_pool(tokens, valid if padding == "exclude" else None))
    return torch.cat(parts, dim=-1)


def _latest(tokens: Tensor, valid: Tensor, k: int, order: str) -> Tensor:
    """The window of k tokens, flattened; tokens [B, L', D] -> [B, k * D]."""
    batch, length, width = tokens.shape
    # argmax gives the first of equal values, and 0 where nothing is valid.
    if order == "latest_first":
        start = valid.int().argmax(1)
    else:
        start = length - valid.flip(1).int().argmax(1) - k
    slot = start.unsqueeze(1) + torch.arange(k, device=tokens.device)  # [B, k]
    outside = (slot < 0) | (slot >= length)
    index = slot.clamp(0, length - 1).unsqueeze(-1).expand(-1, -1, width)
    window = tokens.gather(1, index).masked_fill(outside.unsqueeze(-1), 0.0)
    return window.reshape(batch, k * width)


def _max_pool(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Maximum over positions, or over the valid ones; tokens [B, L', D] -> [B, D]."""
    if valid is None:
        return tokens.amax(1)
    pooled = tokens.masked_fill(~valid.unsqueeze(-1), float("-inf")).amax(1)
    return pooled.masked_fill(~valid.any(1, keepdim=True), 0.0)
