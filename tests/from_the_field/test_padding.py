"""What padded positions return, where nobody said it: what torch returns for that batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import backends
from tests.from_the_field.stock_models import (
    HEADS,
    B,
    D,
    L,
    draw,
    encoder,
    hold_to_stock,
    swapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")

LENGTHS = torch.tensor([40, 17, 12, 31])
RIGHT = torch.arange(L) >= LENGTHS.unsqueeze(1)
ONE_HOLE = RIGHT.clone()
ONE_HOLE[3, 9] = True
MASKS = {
    "right": RIGHT,
    "left": RIGHT.flip(1),
    "one hole in one sequence": ONE_HOLE,
    "newest events masked": RIGHT.roll(3, 1) & (torch.arange(L) >= 3) | (torch.arange(L) < 3),
    "nothing": torch.zeros(B, L, dtype=torch.bool),
}
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L) != 0
BESIDE: dict[str, dict[str, Any]] = {
    "causal": {"mask": CAUSAL},
    "causal, said so": {"mask": CAUSAL, "is_causal": True},
    "all False": {"mask": torch.zeros(L, L, dtype=torch.bool)},
}


def both_run(stock: nn.Module, ours: nn.Module, **call: Any) -> tuple[Tensor, Tensor]:
    x = draw(B, L, D)
    with torch.inference_mode():
        return stock(x, **call), ours(x, **call)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("where", MASKS)
def test_padding_anywhere_returns_what_torch_returns(where: str, norm: bool) -> None:
    stock, mask = encoder(norm=norm), MASKS[where]
    ours = swapped(stock)
    expected, result = both_run(stock, ours, src_key_padding_mask=mask)
    x = draw(B, L, D)
    hold_to_stock(stock, result, lambda m: m(x, src_key_padding_mask=mask))
    if where == "right" and not norm:
        assert (expected[mask] == 0).all()
        assert (result[mask] == 0).all()


@pytest.mark.parametrize("form", ["float", "layouts"])
@pytest.mark.parametrize("where", MASKS)
def test_other_forms_of_the_mask(where: str, form: str) -> None:
    ours, mask = swapped(encoder()), MASKS[where]
    x = draw(B, L, D)
    other = torch.zeros(B, L).masked_fill(mask, -torch.inf)
    if form == "layouts":
        other = torch.empty(L, B, dtype=torch.bool).copy_(mask.T).T
    with torch.inference_mode():
        expected = ours(x, src_key_padding_mask=mask)
        assert torch.equal(ours(x, src_key_padding_mask=other), expected)


@pytest.mark.parametrize("beside", BESIDE)
def test_a_mask_beside_the_padding(beside: str) -> None:
    """Torch then computes padded positions; the fallback is torch's own forward, bit for bit."""
    stock = encoder()
    ours = swapped(stock)
    expected, result = both_run(stock, ours, src_key_padding_mask=RIGHT, **BESIDE[beside])
    assert torch.equal(result, expected)
    assert (expected[RIGHT] != 0).any(-1).all()


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("padded_output", ["zero", "compute"])
def test_a_named_answer_is_kept(padded_output: str, where: str) -> None:
    """And makes the scores of a sequence independent of the others."""
    ours, mask, x = swapped(encoder(), padded_output=padded_output), MASKS[where], draw(B, L, D)
    with torch.inference_mode():
        result = ours(x, src_key_padding_mask=mask)
        for b in range(B):
            alone = ours(x[b : b + 1], src_key_padding_mask=mask[b : b + 1])
            assert torch.equal(alone[0], result[b])
    assert bool((result[mask] == 0).all()) == (padded_output == "zero" or where == "nothing")


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("way", ["compile", "export"])
def test_graphs_decide_per_batch_too(way: str, where: str) -> None:
    """Made from one batch, run on another that is padded otherwise."""
    torch._dynamo.reset()
    ours, x = swapped(encoder(1)), draw(B, L, D)
    other = MASKS["left" if where == "right" else "right"]
    with torch.no_grad():
        if way == "compile":
            graph: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
            graph(x, src_key_padding_mask=other)
        else:
            given = {"src_key_padding_mask": other}
            graph = torch.export.export(ours, (x,), given).module()
        result = graph(x, src_key_padding_mask=MASKS[where])
        assert torch.equal(result, ours(x, src_key_padding_mask=MASKS[where]))
    torch._dynamo.reset()


def test_the_global_switch_is_torchs() -> None:
    stock = encoder()
    ours = swapped(stock)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected, result = both_run(stock, ours, src_key_padding_mask=RIGHT)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert (expected[RIGHT] != 0).any(-1).all()
    assert (result[RIGHT] != 0).any(-1).all()
    _, result = both_run(stock, ours, src_key_padding_mask=RIGHT)
    assert (result[RIGHT] == 0).all()


def test_gradients_take_torch_off_its_zeros() -> None:
    stock, x = encoder(), draw(B, L, D)
    ours = swapped(stock)
    assert torch.equal(ours(x, src_key_padding_mask=RIGHT), stock(x, src_key_padding_mask=RIGHT))


@pytest.mark.parametrize("where", ["right", "left"])
def test_explain_says_which_answer_was_taken(where: str) -> None:
    ours = swapped(encoder())
    (entry,) = seqkernels.explain(ours, draw(B, L, D), src_key_padding_mask=MASKS[where]).entries
    taken, other = ("zero", "compute") if where == "right" else ("compute", "zero")
    (told,) = dict(entry.why_not)[f"padded_output={other!r}"]
    assert f"padded positions return {taken!r} for this batch" in told
    assert entry.runs != "plain PyTorch"


def test_the_report_recommends_to_name_one_answer() -> None:
    report = seqkernels.swap(encoder())
    assert "depends on the rest of the batch" in str(report)
    assert "depends on the rest" not in str(seqkernels.swap(encoder(), padded_output="zero"))
    assert "depends on the rest" not in str(seqkernels.swap(encoder(nhead=3)))


def test_all_users_empty() -> None:
    """Torch's nested path has no answer then; ours is finite, and 0."""
    ours = swapped(encoder())
    with torch.inference_mode():
        result = ours(draw(B, L, D), src_key_padding_mask=torch.ones(B, L, dtype=torch.bool))
    assert (result == 0).all()


class TransAct(nn.Module):
    """Reads padded positions, as the published model does: latest tokens and a maximum over all."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.encoder(x, src_key_padding_mask=mask)
        return torch.cat([h[:, :10].flatten(1), h.amax(1)], dim=1)


def test_one_masked_action_among_many_users() -> None:
    """One user's hole decides for all the others what their padding returns."""
    stock, users = TransAct().eval(), 64
    ours, x = swapped(stock), draw(users, L, D)
    lengths = torch.randint(11, L, (users,), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(L) >= lengths.unsqueeze(1)
    mask[17, 4] = True
    floating = torch.zeros(users, L).masked_fill(mask, -torch.inf)
    for given in (mask, floating):
        with torch.inference_mode():
            result = ours(x, given)
        hold_to_stock(stock, result, lambda m, given=given: m(x, given))  # type: ignore[misc]


def test_unbatched_and_sequence_first_inputs() -> None:
    for options in ({}, {"batch_first": False}):
        stock = encoder(**options)
        ours, x = swapped(stock), draw(B, L, D)
        given = x if stock.layers[0].self_attn.batch_first else x.transpose(0, 1)  # type: ignore[union-attr]
        for src, mask in ((given, RIGHT), (x[1], RIGHT[1])):
            with torch.inference_mode():
                result = ours(src, src_key_padding_mask=mask)
                expected = stock(src, src_key_padding_mask=mask)
            zeros = (expected == 0).all(-1)
            assert torch.equal((result == 0).all(-1), zeros)


def test_a_layer_on_its_own_computes() -> None:
    stock = encoder().layers[0]
    ours = swapped(stock)
    expected, result = both_run(stock, ours, src_key_padding_mask=RIGHT)
    assert (expected[RIGHT] != 0).any(-1).all()
    assert (result[RIGHT] != 0).any(-1).all()
    assert backends.calls


def test_the_option_of_the_module_survives_copies() -> None:
    ours = swapped(encoder())
    other = copy.deepcopy(ours)
    assert other.padded_output == ours.padded_output == "stock"
    assert swapped(encoder(nhead=HEADS + 1)).padded_output == "compute"
