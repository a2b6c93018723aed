"""The reference against torch.nn in fp64, and its summaries against loops."""

import doctest
import itertools
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels.reference import encoder


def test_examples_run() -> None:
    results = doctest.testmod(sys.modules["seqkernels.reference.encoder"])
    assert results.attempted
    assert not results.failed


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
}


def stock(
    d_model: int = 12,
    nhead: int = 2,
    layers: int = 2,
    *,
    activation: str = "relu",
    norm_first: bool = False,
    bias: bool = True,
    eps: float = 1e-5,
    final_norm: bool = False,
    nested: bool = True,
    seed: int = 0,
) -> nn.TransformerEncoder:
    """A torch.nn encoder in fp64 with parameters drawn well away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.TransformerEncoderLayer(
        d_model,
        nhead,
        dim_feedforward=20,
        dropout=0.1,
        activation=activation if activation in ("relu", "gelu") else ACTIVATIONS[activation],
        layer_norm_eps=eps,
        batch_first=True,
        norm_first=norm_first,
        bias=bias,
    )
    norm = nn.LayerNorm(d_model, eps=0.03) if final_norm else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where it cannot take its nested path
        model = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=nested)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
            if "in_proj_weight" in name:
                p[: 2 * d_model] *= 1.5  # logits spread: attention is far from uniform
    return model


def flat_weights(model: nn.TransformerEncoder) -> list[Tensor | None]:
    flat: list[Tensor | None] = []
    for layer in model.layers:
        for module in (layer.self_attn, layer.self_attn.out_proj, layer.linear1, layer.linear2):
            if isinstance(module, nn.MultiheadAttention):
                flat += [module.in_proj_weight, module.in_proj_bias]
            else:
                flat += [module.weight, module.bias]
        flat += [layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias]
    if model.norm is not None:
        flat += [model.norm.weight, model.norm.bias]
    return flat


def draw(batch: int, length: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def right_padding(length: int, lengths: list[int]) -> Tensor:
    return torch.arange(length) >= torch.tensor(lengths)[:, None]


def agree(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def slow_path(model: nn.TransformerEncoder, x: Tensor, mask: Tensor | None) -> Tensor:
    with torch.enable_grad():  # parameters that require a gradient keep torch off its fast path
        return model(x, src_key_padding_mask=mask).detach()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("final_norm", [False, True])
def test_matches_stock_slow_path(
    activation: str, norm_first: bool, bias: bool, final_norm: bool
) -> None:
    model = stock(activation=activation, norm_first=norm_first, bias=bias, final_norm=final_norm)
    x = draw(5, 9, 12)
    for mask in (None, right_padding(9, [9, 4, 1, 0, 8])):
        y = encoder(
            x,
            None,
            flat_weights(model),
            mask,
            nhead=2,
            activation=activation,
            negative_slope=0.2,
            norm_first=norm_first,
            final_norm_eps=0.03,
            padding="compute",
        )
        assert torch.isfinite(y).all()
        agree(y, slow_path(model, x, mask))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("lengths", [[9, 4, 1, 8, 9], [9], [3, 0]])
def test_zero_padding_matches_stock_nested_path(
    activation: str, final_norm: bool, lengths: list[int]
) -> None:
    model = stock(activation=activation, final_norm=final_norm)
    x, mask = draw(len(lengths), 9, 12), right_padding(9, lengths)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nested tensors is in prototype stage"
        expected = model(x, src_key_padding_mask=mask)
    y = encoder(
        x,
        None,
        flat_weights(model),
        mask,
        nhead=2,
        activation=activation,
        final_norm_eps=0.03,
        padding="zero",
    )
    # The nested path pads to the longest sequence it was given; the mask here reaches it.
    agree(y, expected)
    if not final_norm:
        assert (y[mask] == 0).all()
    # Both modes agree on valid positions, and differ on padded ones.
    slow = slow_path(model, x, mask)
    agree(y[~mask], slow[~mask])
    if mask.any():
        assert not torch.allclose(y[mask], slow[mask])


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 0.5])
def test_layer_norm_eps(eps: float) -> None:
    model, x = stock(eps=eps), draw(2, 5, 12)
    y = encoder(x, None, flat_weights(model), nhead=2, layer_norm_eps=eps)
    agree(y, slow_path(model, x, None))


@pytest.mark.parametrize(("d_model", "nhead"), [(12, 1), (12, 3), (12, 12), (20, 2), (7, 1)])
@pytest.mark.parametrize("layers", [1, 3])
def test_heads_and_layers(d_model: int, nhead: int, layers: int) -> None:
    model, x = stock(d_model, nhead, layers), draw(3, 6, d_model)
    y = encoder(x, None, flat_weights(model), nhead=nhead)
    agree(y, slow_path(model, x, None))


@pytest.mark.parametrize("norm_first", [False, True])
def test_left_padding_and_holes_match_each_sequence_alone(norm_first: bool) -> None:
    model, x = stock(norm_first=norm_first, final_norm=True), draw(4, 8, 12)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, :5] = True
    mask[1, ::2] = True
    mask[2, [0, 7]] = True
    mask[3] = True
    weights = flat_weights(model)
    options = {"nhead": 2, "norm_first": norm_first, "final_norm_eps": 0.03}
    computed = encoder(x, None, weights, mask, padding="compute", **options)
    agree(computed, slow_path(model, x, mask))
    zeroed = encoder(x, None, weights, mask, padding="zero", **options)
    assert model.norm is not None
    for b in range(4):
        if not mask[b].all():
            alone = slow_path(model, x[b : b + 1, ~mask[b]], None)[0]
            agree(zeroed[b, ~mask[b]], alone)
        agree(zeroed[b, mask[b]], model.norm.bias.expand(int(mask[b].sum()), -1))


def test_query_without_keys_has_no_attention_output() -> None:
    model, x = stock(layers=1), draw(1, 4, 12)
    layer = model.layers[0]
    y = encoder(
        x, None, flat_weights(model), torch.ones(1, 4, dtype=torch.bool), nhead=2, padding="compute"
    )
    z = layer.norm1(x + layer.self_attn.out_proj.bias)
    agree(y, layer.norm2(z + layer.linear2(F.relu(layer.linear1(z)))))


def test_mask_forms_agree_bitwise() -> None:
    model, x = stock(), draw(4, 6, 12)
    lengths = torch.tensor([6, 3, 0, 1])
    mask = right_padding(6, lengths.tolist())
    floating = torch.zeros(4, 6).masked_fill(mask, float("-inf"))
    weights = flat_weights(model)
    for padding in ("zero", "compute"):
        y = encoder(x, None, weights, mask, nhead=2, padding=padding)
        assert torch.equal(y, encoder(x, None, weights, floating, nhead=2, padding=padding))
        for kind in (torch.int32, torch.int64):
            other = encoder(x, None, weights, None, lengths.to(kind), nhead=2, padding=padding)
            assert torch.equal(y, other)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("norm_first", [False, True])
def test_poison_stays_in_its_slot(poison: float, norm_first: bool) -> None:
    model, x = stock(norm_first=norm_first), draw(4, 6, 12)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 3:] = True
    mask[1, ::2] = True
    mask[2] = True
    poisoned = x.masked_fill(mask.unsqueeze(-1), poison)
    weights = flat_weights(model)
    options = {"nhead": 2, "norm_first": norm_first}
    for padding in ("zero", "compute"):
        clean = encoder(x, None, weights, mask, padding=padding, **options)
        y = encoder(poisoned, None, weights, mask, padding=padding, **options)
        assert torch.equal(y[~mask], clean[~mask])
        assert torch.isfinite(y[mask]).any() == (padding == "zero")
    summary = encoder(
        poisoned, None, weights, mask, padding="exclude", latest_k=2, pool="max", **options
    )
    assert torch.isfinite(summary).all()


def test_nan_in_a_valid_slot_is_seen() -> None:
    model, x = stock(), draw(2, 6, 12)
    x[0, 2, 3] = float("nan")
    lengths = torch.tensor([4, 4])
    for padding in ("zero", "compute", "exclude"):
        y = encoder(
            x, None, flat_weights(model), None, lengths, nhead=2, padding=padding, latest_k=2,
            pool="max",
        )  # fmt: skip
        assert torch.isnan(y[0]).all()
        assert torch.isfinite(y[1]).all()


def summary_by_loops(
    full: Tensor, valid: Tensor, candidate_token: bool, padding: str, order: str, k: int, pool: str
) -> Tensor:
    """[latest k ; pool] of full-sequence outputs [B, L', D], position by position."""
    rows = []
    batch, length, width = full.shape
    for b in range(batch):
        flags = [bool(v) for v in valid[b]]
        if candidate_token:
            flags = [True, *flags] if order == "latest_first" else [*flags, True]
        where = [i for i in range(length) if flags[i]]
        if order == "latest_first":
            first = where[0] if where else 0
            slots = list(range(first, first + k))
        else:
            last = where[-1] if where else length - 1
            slots = list(range(last - k + 1, last + 1))
        zero = torch.zeros(width, dtype=full.dtype)
        out = [full[b, s] if 0 <= s < length else zero for s in slots]
        if pool == "max":
            pooled = zero if padding == "exclude" and not where else None
            if pooled is None:
                chosen = where if padding == "exclude" else list(range(length))
                pooled = full[b, chosen[0]]
                for i in chosen[1:]:
                    pooled = torch.maximum(pooled, full[b, i])
            out.append(pooled)
        rows.append(torch.cat(out))
    return torch.stack(rows)


@pytest.mark.parametrize("fusion", ["none", "concat", "append"])
@pytest.mark.parametrize("order", ["latest_first", "latest_last"])
@pytest.mark.parametrize("padding", ["zero", "compute", "exclude"])
@pytest.mark.parametrize("final_norm", [False, True])
def test_summaries_match_loops(fusion: str, order: str, padding: str, final_norm: bool) -> None:
    width, length = 12, 5
    model = stock(width, final_norm=final_norm)
    weights = flat_weights(model)
    event = width - 4 if fusion == "concat" else width
    x = draw(6, length, event)
    candidate = None if fusion == "none" else draw(6, 1, width if event == width else 4, 2)[:, 0]
    mask = torch.zeros(6, length, dtype=torch.bool)
    mask[1, 3:] = True
    mask[2, :2] = True
    mask[3, [0, 2, 4]] = True
    mask[4] = True
    tokens, hidden, added = x, mask, 0
    if fusion == "concat":
        assert candidate is not None
        tokens = torch.cat([x, candidate[:, None].repeat(1, length, 1)], -1)
    elif fusion == "append":
        assert candidate is not None
        added, front = 1, order == "latest_first"
        extra = torch.zeros(6, 1, dtype=torch.bool)
        tokens = torch.cat([candidate[:, None], x] if front else [x, candidate[:, None]], 1)
        hidden = torch.cat([extra, mask] if front else [mask, extra], 1)
    full = slow_path(model, tokens, hidden)
    if padding != "compute":
        full = full.masked_fill(hidden[:, :, None], 0.0)
        if final_norm:
            assert model.norm is not None
            full[hidden] = model.norm.bias.detach()
    for k, pool in itertools.product((0, 1, 3, length + 3), ("max", "none")):
        if pool == "none" and (k == 0 or padding == "exclude"):
            continue
        y = encoder(
            x,
            candidate,
            weights,
            mask,
            nhead=2,
            fusion=fusion,
            order=order,
            padding=padding,
            final_norm_eps=0.03,
            latest_k=k,
            pool=pool,
        )
        expected = summary_by_loops(full, ~mask, bool(added), padding, order, k, pool)
        assert y.shape == (6, width * (k + (pool == "max")))
        agree(y, expected)
    if padding != "exclude":
        y = encoder(
            x, candidate, weights, mask, nhead=2, fusion=fusion, order=order, padding=padding,
            final_norm_eps=0.03,
        )  # fmt: skip
        assert y.shape == (6, length + added, width)
        agree(y, full)


@pytest.mark.parametrize("padding", ["zero", "compute"])
def test_empty_batch_and_one_event(padding: str) -> None:
    model = stock()
    weights = flat_weights(model)
    y = encoder(draw(0, 5, 12), None, weights, nhead=2, padding=padding)
    assert y.shape == (0, 5, 12)
    y = encoder(draw(0, 5, 12), None, weights, nhead=2, padding=padding, latest_k=2, pool="max")
    assert y.shape == (0, 36)
    x = draw(2, 1, 12)
    agree(encoder(x, None, weights, nhead=2), slow_path(model, x, None))


def test_absent_norm_weights_are_one_and_zero() -> None:
    model, x = stock(final_norm=True), draw(2, 5, 12)
    weights = flat_weights(model)
    for i, w in enumerate(weights):
        if w is not None and w.dim() == 1 and (i >= 24 or i % 12 >= 8):
            with torch.no_grad():
                w.fill_(1.0 if i % 2 == 0 else 0.0)
    bare = [None if i >= 24 or i % 12 >= 8 else w for i, w in enumerate(weights)]
    agree(encoder(x, None, bare, nhead=2), encoder(x, None, weights, nhead=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    model, x = stock(), draw(2, 5, 12)
    y = encoder(x.to(dtype), None, flat_weights(model), nhead=2)
    assert y.dtype == dtype
    error = (y.double() - slow_path(model, x, None)).abs().max().item()
    assert error <= 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("padding", ["zero", "compute", "exclude"])
def test_gradients(padding: str) -> None:
    model = stock(4, 2, layers=1, activation="gelu", final_norm=True)
    weights = flat_weights(model)
    x, candidate = draw(3, 3, 4), draw(3, 1, 4, 2)[:, 0]
    mask = torch.tensor([[False, True, False], [True, True, True], [False, False, False]])

    def run(x: Tensor, candidate: Tensor, *weights: Tensor | None) -> Tensor:
        return encoder(
            x, candidate, weights, mask, nhead=2, activation="gelu", fusion="append",
            padding=padding, final_norm_eps=0.03, latest_k=2, pool="max",
        )  # fmt: skip

    leaves = [x.requires_grad_(), candidate.requires_grad_(), *weights]
    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_are_those_of_stock_and_finite_for_an_empty_user() -> None:
    model, x = stock(), draw(3, 6, 12)
    mask = right_padding(6, [6, 2, 0])
    x = x.masked_fill(mask.unsqueeze(-1), float("nan"))
    weights = flat_weights(model)
    present = [w for w in weights if w is not None]
    y = encoder(x, None, weights, mask, nhead=2)
    gradients = torch.autograd.grad(y[:2].square().sum(), present)
    clean = x.nan_to_num()
    z = model(clean, src_key_padding_mask=mask)[:2].masked_fill(mask[:2, :, None], 0.0)
    for ours, theirs in zip(gradients, torch.autograd.grad(z.square().sum(), present), strict=True):
        agree(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation: expected one of .* got 'swish'"),
        ({"fusion": "add"}, "fusion: expected one of"),
        ({"fusion": "concat"}, "candidate: expected a tensor"),
        ({"candidate": torch.zeros(2, 4)}, "candidate: expected None"),
        ({"pool": "max"}, "pool: expected 'none' without latest_k"),
        ({"latest_k": 0}, "latest_k: expected at least 1"),
        ({"latest_k": -1, "pool": "max"}, "latest_k: expected at least 0"),
        ({"padding": "exclude"}, "expected pool='max'"),
        ({"lengths": torch.tensor([6, 0])}, r"lengths: expected values in \[0, 5\], got 0 to 6"),
        ({"lengths": torch.tensor([-1, 0])}, "lengths: expected values"),
        ({"lengths": torch.tensor([1])}, "lengths: expected shape"),
        ({"key_padding_mask": torch.zeros(2, 1).bool()}, "key_padding_mask: expected shape"),
        (
            {"key_padding_mask": torch.zeros(2, 5), "lengths": torch.tensor([1, 2])},
            "lengths: expected None beside key_padding_mask",
        ),
        ({"nhead": 5}, "nhead: expected a divisor of 12, got 5"),
        ({"weights": [None] * 12}, "weights: expected a tensor for every projection"),
        ({"weights": [None] * 13}, "weights: expected 12 per layer"),
    ],
)
def test_bad_options(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": draw(2, 5, 12),
        "candidate": None,
        "weights": flat_weights(stock()),
        "nhead": 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        encoder(**arguments)  # type: ignore[arg-type]
