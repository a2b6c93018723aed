"""One user's events, many candidates: the encoder over the repeated user, and its factored form.

Letters: U users, N candidates, L events, E event width, C candidate width, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkernels.reference.encoder import encoder, finish_layer, valid_positions


def request_scoring(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Encode each candidate with the events of its user, in the dtype of ``events``.

    ::

        out[n] = encoder(events[user_index[n]], candidates[n])

    Parameters
    ----------
    events : Tensor
        [U, L, E], any floating dtype.
    candidates : Tensor
        [N, C].
    user_index : Tensor
        [N], integers in 0 .. U - 1, in any order.
    weights, **options
        As in `seqkernels.reference.encoder`, with ``fusion`` ``"concat"`` or ``"append"``.
    key_padding_mask, lengths : Tensor, optional
        [U, L] or [U], of the users.

    Returns
    -------
    Tensor
        [N, out], or [N, L', D] without ``latest_k``.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    >>> weights = list(layer.state_dict().values())
    >>> events, candidates = torch.randn(2, 5, 8), torch.randn(3, 4)
    >>> index, options = torch.tensor([1, 0, 1]), {"nhead": 2, "fusion": "concat", "latest_k": 1}
    >>> request_scoring(events, candidates, index, weights, **options).shape
    torch.Size([3, 12])
    """
    return encoder(
        events[user_index],
        candidates,
        weights,
        None if key_padding_mask is None else key_padding_mask[user_index],
        None if lengths is None else lengths[user_index],
        **options,
    )


def factored_first_layer(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    nhead: int,
    activation: str = "relu",
    negative_slope: float = 0.01,
    layer_norm_eps: float = 1e-5,
) -> Tensor:
    """The first post-norm layer of the tokens [event ; candidate], its user part computed once.

    With W_e and W_c the columns of a projection for the event and for the candidate::

        q_i = W_q,e e_i + b_q;   a = W_q,c c;   k_j = W_k,e e_j;   v_j = W_v,e e_j
        E_ij = exp((q_i k_j - max_j q_i k_j) / sqrt(d))           once a user
        w_j = exp((a k_j - max_j a k_j) / sqrt(d));   f = W_v,c c + b_v      once a candidate
        attention_i = sum_j E_ij w_j v_j / sum_j E_ij w_j + f

    which equals attention over x_i = [e_i ; c]: in (q_i + a) (k_j + d) all terms without j leave
    the softmax, and the rows of a softmax sum to 1.

    Parameters
    ----------
    events, candidates, user_index, key_padding_mask, lengths
        As in `request_scoring`.
    weights : sequence of Tensor or None
        The twelve of one layer.
    nhead, activation, negative_slope, layer_norm_eps
        As in `seqkernels.reference.encoder`.

    Returns
    -------
    Tensor
        [N, L, D], the layer's output at every position.
    """
    w_in, b_in = weights[:2]
    assert w_in is not None
    _, length, width = events.shape
    d_model = w_in.shape[1]
    head_dim = d_model // nhead
    w_in = w_in.to(events.dtype)
    bias = w_in.new_zeros(3 * d_model) if b_in is None else b_in.to(events.dtype)

    def heads(t: Tensor) -> Tensor:  # [..., T, D] -> [..., h, T, d]
        return t.reshape(*t.shape[:-1], nhead, head_dim).transpose(-3, -2)

    valid = valid_positions(events, key_padding_mask, lengths)  # [U, L]
    events = events.masked_fill(~valid.unsqueeze(-1), 0.0)
    q, k, v = (heads(t) for t in (events @ w_in[:, :width].T).chunk(3, -1))  # [U, h, L, d]
    q = q + bias[:d_model].view(nhead, 1, head_dim)
    parts = (candidates @ w_in[:, width:].T).reshape(-1, 3, nhead, head_dim)
    a, f = parts[:, 0], parts[:, 2]  # [N, h, d]
    f = f + bias[2 * d_model :].view(nhead, head_dim)  # [N, h, d]

    hidden = ~valid[:, None, None, :]  # [U, 1, 1, L]
    s = (q @ k.transpose(-2, -1)) / math.sqrt(head_dim)  # [U, h, L, L]
    s = s.masked_fill(hidden, -math.inf)
    exponentials = (s - s.amax(-1, keepdim=True)).exp().nan_to_num(0.0)  # [U, h, L, L]
    t = (k[user_index] @ a.unsqueeze(-1)).squeeze(-1) / math.sqrt(head_dim)  # [N, h, L]
    t = t.masked_fill(~valid[user_index].unsqueeze(1), -math.inf)
    w = (t - t.amax(-1, keepdim=True)).exp().nan_to_num(0.0)  # [N, h, L]

    shared = exponentials[user_index]
    weighted = w.unsqueeze(-1) * v[user_index]  # [N, h, L, d]
    total = shared @ w.unsqueeze(-1)  # [N, h, L, 1]
    mixed = shared @ weighted / total + f.unsqueeze(-2)
    mixed = torch.where(valid.any(1)[user_index].view(-1, 1, 1, 1), mixed, 0.0)
    tokens = torch.cat(
        [events[user_index], candidates.unsqueeze(1).expand(-1, length, -1)], dim=-1
    )  # [N, L, D]
    attended = mixed.transpose(1, 2).reshape(len(candidates), length, d_model)
    return finish_layer(tokens, attended, weights, activation, negative_slope, layer_norm_eps)
