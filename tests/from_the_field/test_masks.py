"""Padding masks as public models make them: large negatives, zeros and ones, biases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import BackendUnavailableError, backends, reference, settings
from tests.from_the_field.stock_models import B, D, L, draw, encoder, hold_to_stock, swapped

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")

LENGTHS = torch.tensor([40, 17, 12, 31])
RIGHT = torch.arange(L) >= LENGTHS.unsqueeze(1)
IGNORING = {
    "-1e4": (-1e4, torch.float32),
    "-10000 in bf16": (-1e4, torch.bfloat16),
    "-1e9": (-1e9, torch.float32),
    "lowest float32": (torch.finfo(torch.float32).min, torch.float32),
    "lowest float64": (torch.finfo(torch.float64).min, torch.float64),
    "-65504 in fp16": (torch.finfo(torch.float16).min, torch.float16),
    "-inf": (-torch.inf, torch.float32),
}


@pytest.fixture(autouse=True)
def _count_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_reported", set())
    backends.calls.clear()


def additive(mask: Tensor, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, value)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", IGNORING)
def test_large_negatives_ignore(name: str, flip: bool) -> None:
    value, dtype = IGNORING[name]
    stock, x = encoder(), draw(B, L, D)
    ours = swapped(stock, strict=True)
    mask = RIGHT.flip(1) if flip else RIGHT
    with torch.inference_mode(), settings.override(strict=True):
        result = ours(x, src_key_padding_mask=additive(mask, value, dtype))
        assert torch.equal(result, ours(x, src_key_padding_mask=mask))
    assert sum(backends.calls.values()) == 2
    floating = additive(mask, value if dtype is torch.float32 else -torch.inf)
    hold_to_stock(stock, result, lambda m: m(x, src_key_padding_mask=floating))


BIASES = {
    "zeros and ones": RIGHT.float(),
    "zeros and ones, left": RIGHT.flip(1).float(),
    "small negatives": additive(RIGHT, -5.0),
    "a bias and what is ignored": additive(RIGHT, -1e9).masked_fill(RIGHT.flip(1) & ~RIGHT, 0.7),
}


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("name", BIASES)
def test_other_values_are_torchs(name: str, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """They are added to the scores, or on torch's nested path ignore: its own forward runs."""
    stock, x, mask = encoder(), draw(B, L, D), BIASES[name]
    ours = swapped(stock, backend=backend)
    with torch.inference_mode():
        if backend == "cpu":
            with pytest.raises(BackendUnavailableError, match="holds values other than 0"):
                ours(x, src_key_padding_mask=mask)
            return
        for _ in range(2):
            result = ours(x, src_key_padding_mask=mask)
            expected = stock(x, src_key_padding_mask=mask)
            # Torch's fused path is NaN where a mask has no zero; nothing here is.
            answered = expected.isfinite().flatten(1).all(1)
            assert torch.equal(result[answered], expected[answered])
            assert result.isfinite().all()
            assert answered.any()
    told = [r.message for r in caplog.records if r.name == "seqkernels"]
    assert len(told) == 1
    assert "holds values other than 0" in told[0]


def test_explain_says_what_a_mask_of_other_values_runs() -> None:
    ours, x = swapped(encoder()), draw(B, L, D)
    for mask, runs in ((BIASES["small negatives"], True), (additive(RIGHT, -1e4), False)):
        (entry,) = seqkernels.explain(ours, x, src_key_padding_mask=mask).entries
        assert (entry.runs == "plain PyTorch") == runs
        assert ("fused kernel" in dict(entry.why_not)) == runs


@pytest.mark.parametrize("fusion", ["none", "concat", "append"])
def test_a_bias_in_this_package_s_own_encoder(fusion: str) -> None:
    """The reference adds it, and the oracle of the rule is the reference in fp64."""
    extra = {"none": 0, "concat": 32, "append": D}[fusion]
    wide = D - extra if fusion == "concat" else D
    torch.manual_seed(0)
    module = seqkernels.nn.UserSequenceEncoder(wide, extra, 2, 32, 1, fusion=fusion).eval()
    events, candidate = draw(B, L, wide), draw(B, extra, seed=1) if extra else None
    mask = BIASES["a bias and what is ignored"]
    weights = list(module.encoder.layers[0].parameters())
    names = [name for name, _ in module.encoder.layers[0].named_parameters()]
    assert names[0] == "self_attn.in_proj_weight"
    expected = reference.encoder(
        events.double(),
        None if candidate is None else candidate.double(),
        [w.detach() for w in weights],
        mask,
        nhead=2,
        fusion=fusion,
        latest_k=8,
        pool="max",
    )
    with torch.inference_mode():
        torch.testing.assert_close(module(events, candidate, mask), expected.float())
        if candidate is not None:
            index = torch.arange(B)
            scored = module.score_candidates(events, candidate, index, mask)
            torch.testing.assert_close(scored, expected.float())


def test_the_op_itself_adds_a_bias() -> None:
    stock, x = encoder(1, nhead=3), draw(B, L, D)
    mask = BIASES["small negatives"]
    layer = stock.layers[0]
    weights = [p.detach() for p in layer.parameters()]
    options = (3, "relu", 0.01, False, 1e-5, 1e-5, "none", "compute", "latest_first", None, "none")
    with torch.inference_mode():
        result = seqkernels.ops.encoder(x, None, weights, mask, None, *options, "auto")
        torch.testing.assert_close(result, stock(x, src_key_padding_mask=mask))
    assert backends.calls == {"reference": 1}


def test_nan_in_a_mask_stays_visible() -> None:
    stock, x = encoder(nhead=3), draw(B, L, D)
    mask = torch.zeros(B, L)
    mask[0, 3] = torch.nan
    with torch.inference_mode():
        result = swapped(stock)(x, src_key_padding_mask=mask)
        expected = stock(x, src_key_padding_mask=mask)
    assert torch.equal(result.isnan(), expected.isnan())
    assert result[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integer_masks_are_refused_in_one_sentence(dtype: torch.dtype) -> None:
    ours: nn.Module = swapped(encoder())
    with torch.inference_mode(), pytest.raises(TypeError, match="key_padding_mask: expected bool"):
        ours(draw(B, L, D), src_key_padding_mask=RIGHT.to(dtype))
