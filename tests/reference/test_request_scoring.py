"""The factored first layer against the encoder over the repeated user, in fp64."""

from __future__ import annotations

import pytest
import torch

from seqkernels import reference
from seqkernels.reference.request_scoring import factored_first_layer, request_scoring
from seqkernels.testing import EncoderCase

USERS, CANDIDATES = 4, 11


def problem(case: EncoderCase) -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    drawn = case.problem()
    g = torch.Generator().manual_seed(1)
    assert drawn.candidate is not None
    candidates = torch.randn(CANDIDATES, drawn.candidate.shape[1], generator=g).double()
    user_index = torch.randint(USERS, (CANDIDATES,), generator=g)
    arguments = (
        drawn.x.double(),
        candidates,
        user_index,
        drawn.weights,
        drawn.key_padding_mask,
        drawn.lengths,
    )
    return arguments, drawn.options


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes", "empty"])
@pytest.mark.parametrize("nhead", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_factored_layer_is_the_layer(
    bias: bool, activation: str, nhead: int, mask: str
) -> None:
    case = EncoderCase(
        batch=USERS,
        length=9,
        d_model=24,
        nhead=nhead,
        num_layers=1,
        fusion="concat",
        padding="compute",
        mask=mask,
        activation=activation,
        bias=bias,
    )
    arguments, options = problem(case)
    whole = request_scoring(*arguments, **options)
    kept = {k: options[k] for k in ("nhead", "activation", "negative_slope", "layer_norm_eps")}
    factored = factored_first_layer(*arguments, **kept)
    _, _, user_index, _, ignored, _ = arguments
    valid = torch.ones(CANDIDATES, 9, dtype=torch.bool)
    if ignored is not None:
        valid = ~ignored[user_index]
    assert (whole - factored)[valid].abs().max() < 1e-12


@pytest.mark.parametrize("fusion", ["concat", "append"])
def test_it_is_the_encoder_over_the_repeated_user(fusion: str) -> None:
    case = EncoderCase(
        batch=USERS, length=9, d_model=24, fusion=fusion, mask="right", latest_k=3, pool="max"
    )
    (events, candidates, user_index, weights, ignored, _), options = problem(case)
    ours = request_scoring(events, candidates, user_index, weights, ignored, **options)
    for n, user in enumerate(user_index.tolist()):
        alone = reference.encoder(
            events[user : user + 1],
            candidates[n : n + 1],
            weights,
            None if ignored is None else ignored[user : user + 1],
            **options,
        )
        torch.testing.assert_close(ours[n : n + 1], alone)
