"""swap: what it replaces, what it leaves and why, what it keeps, and the way back."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import BackendUnavailableError, SwapReport, backends, settings
from seqkernels.backends import native_module
from seqkernels.swap import Skipped
from seqkernels.testing import assert_close_to_oracle

D, HEADS, FF = 16, 2, 8
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")
has_native = native_module.module is not None
native = pytest.mark.skipif(not has_native, reason="there is no native module")


@pytest.fixture(autouse=True)
def _backend_without_native() -> Any:
    """Without a native module the reference has to be asked for, or nothing is replaced."""
    with settings.override(backend=None if has_native else "reference"):
        backends.calls.clear()
        yield None


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(D, HEADS, FF, **{"batch_first": True} | options)


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer(**options), layers)


class Ranker(nn.Module):
    """As rankers are built: embed, encode, pool, score; one layer stands alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, D)
        self.encoder = encoder()
        self.extra = layer()
        self.head = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 1))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))

    def forward(self, items: Tensor) -> Tensor:
        x: Tensor = self.encoder(self.embed(items), src_key_padding_mask=items == 0)
        return self.head(self.extra(x).amax(1)).squeeze(-1)


ITEMS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 0, 0, 0, 0]])


def score(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(ITEMS)
    return result


def assert_same_function(
    build: Callable[[], nn.Module],
    call: Callable[[nn.Module, torch.dtype], Tensor],
    change: Callable[[nn.Module], object],
) -> None:
    """A changed model computes what the stock one does, by the rule of `seqkernels.testing`.

    Over many models, since a score or two are too few values for a yardstick.
    """
    actual, golden, low = [], [], []
    for seed in range(32):
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        for dtype, results in ((torch.float64, golden), (torch.bfloat16, low)):
            torch.manual_seed(seed)
            with torch.inference_mode():
                results.append(call(copy.deepcopy(model).to(dtype), dtype).flatten()[None])
        change(model)
        torch.manual_seed(seed)
        with torch.inference_mode():
            actual.append(call(model, torch.float32).flatten()[None])
    assert_close_to_oracle(actual, golden, low)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """The same bf16 values in any dtype."""
    return torch.randn(*shape).bfloat16().to(dtype)


def types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def insisted(report: SwapReport) -> list[Skipped]:
    """What was left although ``strict`` would insist on it."""
    return [s for s in report.skipped if not s.optional]


def test_swap_and_restore() -> None:
    model = Ranker().eval()
    before, classes = score(model), types(model)
    assert_same_function(Ranker, lambda m, _: m(ITEMS), seqkernels.swap)
    objects = dict(model.named_modules())
    state = list(model.state_dict())

    report = seqkernels.swap(model)
    assert isinstance(report, SwapReport)
    assert [(r.name, r.type, r.padded_output) for r in report.replaced] == [
        ("encoder", "torch.nn.TransformerEncoder", "stock"),
        ("extra", "torch.nn.TransformerEncoderLayer", "compute"),
    ]
    assert not insisted(report)
    assert type(model.encoder) is seqkernels.nn.TransformerEncoder
    assert type(model.encoder.layers[1]) is seqkernels.nn.TransformerEncoderLayer
    assert type(model.extra) is seqkernels.nn.TransformerEncoderLayer
    assert list(model.state_dict()) == state
    backends.calls.clear()
    score(model)
    assert sum(backends.calls.values()) == 2
    if has_native:
        assert all(label.startswith("cpu/") for label in backends.calls)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    report.restore()
    assert types(model) == classes
    assert all(module is objects[name] for name, module in model.named_modules())
    assert "padded_output" not in model.encoder.__dict__
    expected = Ranker().eval()
    expected.load_state_dict(model.state_dict())
    assert torch.equal(score(model), score(expected))
    assert not torch.equal(score(model), before)
    report.restore()  # nothing left to do
    assert types(model) == classes


def test_a_second_swap_changes_nothing() -> None:
    model = Ranker().eval()
    first = seqkernels.swap(model)
    classes, result = types(model), score(model)
    second = seqkernels.swap(model)
    assert not second.replaced
    assert not insisted(second)
    assert types(model) == classes
    second.restore()
    assert torch.equal(score(model), result)
    first.restore()
    assert type(model.encoder) is nn.TransformerEncoder


@pytest.mark.parametrize("training", [False, True])
def test_flags_are_kept(training: bool) -> None:
    model = Ranker().train(training)
    model.encoder.layers[0].dropout.train(not training)
    model.extra.linear1.weight.requires_grad_(False)
    flags = {name: module.training for name, module in model.named_modules()}
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    report = seqkernels.swap(model)
    assert len(report.replaced) == 2
    for _ in range(2):
        assert {name: module.training for name, module in model.named_modules()} == flags
        assert {name: p.requires_grad for name, p in model.named_parameters()} == wants
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
        report.restore()


@pytest.mark.parametrize("kind", ["encoder", "layer"])
def test_the_model_itself_may_be_an_encoder(kind: str) -> None:
    model = (encoder() if kind == "encoder" else layer()).eval()
    x = torch.randn(2, 5, D)
    report = seqkernels.swap(model)
    assert [r.name for r in report.replaced] == [""]
    assert "(the model)" in str(report)
    assert type(model).__module__.startswith("seqkernels.nn")
    with torch.inference_mode():
        assert model(x).shape == x.shape
    assert sum(backends.calls.values()) == 1
    report.restore()
    assert type(model).__module__.startswith("torch.nn")


def test_shared_modules_are_replaced_once() -> None:
    shared = encoder()
    model = nn.ModuleDict({"user": shared, "item": nn.Sequential(shared)}).eval()
    report = seqkernels.swap(model)
    assert [(r.name, r.also) for r in report.replaced] == [("user", ("item.0",))]
    assert model["user"] is model["item"][0] is shared  # type: ignore[index]
    assert "user = item.0" in str(report)
    report.restore()
    assert type(shared) is nn.TransformerEncoder


def test_a_layer_used_inside_and_alone_belongs_to_its_encoder() -> None:
    whole = encoder()
    model = nn.ModuleDict({"alone": whole.layers[0], "whole": whole}).eval()
    report = seqkernels.swap(model)
    assert [r.name for r in report.replaced] == ["whole"]
    assert type(model["alone"]) is seqkernels.nn.TransformerEncoderLayer
    report.restore()
    assert type(model["alone"]) is nn.TransformerEncoderLayer


def test_references_elsewhere_stay_good() -> None:
    model = Ranker().eval()
    kept = model.encoder
    report = seqkernels.swap(model)
    assert kept is model.encoder
    with torch.inference_mode():
        kept(torch.randn(1, 4, D))
    assert sum(backends.calls.values()) == 1
    report.restore()


def test_other_instances_and_classes_are_untouched() -> None:
    model, other = Ranker().eval(), Ranker().eval()
    methods = dict(vars(nn.TransformerEncoder)), dict(vars(nn.TransformerEncoderLayer))
    seqkernels.swap(model)
    assert type(other.encoder) is nn.TransformerEncoder
    assert methods == (dict(vars(nn.TransformerEncoder)), dict(vars(nn.TransformerEncoderLayer)))


def test_hooks_on_the_encoder_itself_keep_running() -> None:
    model, seen = Ranker().eval(), []
    model.encoder.register_forward_hook(lambda *_: seen.append(1))
    report = seqkernels.swap(model)
    assert len(report.replaced) == 2
    score(model)
    report.restore()
    score(model)
    assert len(seen) == 2


def test_copies_pickles_and_files_of_a_swapped_model() -> None:
    model = Ranker().eval()
    seqkernels.swap(model)
    expected = score(model)
    assert torch.equal(score(copy.deepcopy(model)), expected)
    assert torch.equal(score(pickle.loads(pickle.dumps(model))), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    stock = Ranker().eval()
    stock.load_state_dict(torch.load(file), strict=True)
    seqkernels.swap(stock)
    assert torch.equal(score(stock), expected)


@pytest.mark.parametrize("nested", [True, False])
def test_padding_is_what_the_module_returned(nested: bool) -> None:
    ignored = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])

    def build() -> nn.Module:
        return nn.TransformerEncoder(layer(), 2, nn.LayerNorm(D), enable_nested_tensor=nested)

    def call(model: nn.Module, dtype: torch.dtype) -> Tensor:
        x = random(2, 5, D, dtype=dtype)
        return model(x, src_key_padding_mask=ignored)

    assert_same_function(build, call, seqkernels.swap)
    model = build().eval()
    report = seqkernels.swap(model)
    assert report.replaced[0].padded_output == ("stock" if nested else "compute")
    report.restore()
    chosen = seqkernels.swap(model, padded_output="compute" if nested else "zero")
    assert chosen.replaced[0].padded_output == ("compute" if nested else "zero")


# --- what is left ---------------------------------------------------------------------------------


class Subclass(nn.TransformerEncoderLayer):
    pass


class SubclassedEncoder(nn.TransformerEncoder):
    pass


def subclass() -> nn.Module:
    return Subclass(D, HEADS, FF)


def subclassed_encoder() -> nn.Module:
    return SubclassedEncoder(layer(), 1)


def encoder_of_subclasses() -> nn.Module:
    return nn.TransformerEncoder(Subclass(D, HEADS, FF, batch_first=True), 1)


def inner_hook() -> nn.Module:
    module = encoder()
    module.layers[0].self_attn.register_forward_hook(lambda *_: None)
    return module


def weight_norm() -> nn.Module:
    module = layer()
    nn.utils.parametrizations.weight_norm(module.linear1)
    return module


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    module = layer()
    prune.l1_unstructured(module.linear2, "weight", amount=0.5)
    return module


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(layer(), {nn.Linear})


class TaggedTensor(Tensor):
    pass


def tensor_subclass() -> nn.Module:
    module = layer()
    weight = module.linear1.weight.detach().as_subclass(TaggedTensor)
    module.linear1.weight = nn.Parameter(weight)
    return module


def patched_forward() -> nn.Module:
    module = encoder()
    original = module.forward
    module.forward = lambda *args, **keywords: original(*args, **keywords) + 1.0  # type: ignore[method-assign]
    return module


def unknown_activation() -> nn.Module:
    return encoder(activation=torch.tanh)


def heterogeneous() -> nn.Module:
    module = encoder()
    module.layers[1] = nn.TransformerEncoderLayer(D, 4, FF, batch_first=True, norm_first=True)
    return module


def fp64() -> nn.Module:
    return encoder().double()


def fp16() -> nn.Module:
    return layer().half()


def mixed_dtypes() -> nn.Module:
    module = layer()
    module.norm1.bfloat16()
    return module


LEFT: dict[Any, str] = {
    subclass: "it is a subclass of torch.nn.TransformerEncoderLayer",
    subclassed_encoder: "it is a subclass of torch.nn.TransformerEncoder",
    encoder_of_subclasses: "not a torch.nn.TransformerEncoderLayer itself",
    inner_hook: "layers.0.self_attn has forward hooks, which would not run",
    weight_norm: "layer.linear1 is parametrized",
    pruned: "layer.linear2.weight is not a parameter of its own",
    quantized: "layer.linear1 is a Linear, not a torch.nn.Linear",
    tensor_subclass: "layer.linear1.weight is a TaggedTensor, not a plain tensor",
    patched_forward: "its forward was replaced on the instance",
    unknown_activation: "layers.0.activation 'tanh' is none the kernel knows",
    heterogeneous: "layers.1 differs from layers.0 in nhead, norm_first",
    fp64: "cpu: dtype torch.float64, it takes float32 and bfloat16",
    fp16: "cpu: dtype torch.float16, it takes float32 and bfloat16",
    mixed_dtypes: "its parameters have different dtypes: torch.bfloat16, torch.float32",
}


@native
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("build", LEFT, ids=lambda build: build.__name__)
def test_left_alone_with_the_reason(build: Any) -> None:
    model = nn.ModuleDict({"odd": build(), "plain": layer()}).eval()
    classes = types(model["odd"])
    report = seqkernels.swap(model)
    assert types(model["odd"]) == classes
    (skipped,) = report.skipped
    assert skipped.name == "odd"
    assert any(LEFT[build] in reason for reason in skipped.reasons), skipped.reasons
    assert [r.name for r in report.replaced] == ["plain"]
    told = " ".join(str(report).split())
    assert "left:" in told
    assert "replaced, padded_output='compute'" in told
    report.restore()

    with pytest.raises(BackendUnavailableError, match="swap: strict") as caught:
        seqkernels.swap(model, strict=True)
    assert LEFT[build] in str(caught.value)
    assert type(model["plain"]) is nn.TransformerEncoderLayer  # nothing was replaced


def test_without_a_fused_kernel_the_model_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain definition would be slower than torch's own module."""
    monkeypatch.setattr(native_module, "module", None)
    monkeypatch.setattr(native_module, "import_error", "it was not built")
    model = Ranker()
    with settings.override(backend="auto"):
        report = seqkernels.swap(model)
    assert [s.reasons for s in insisted(report)] == [("cpu: it was not built",)] * 2
    assert type(model.encoder) is nn.TransformerEncoder
    with pytest.raises(
        BackendUnavailableError, match="swap: backend 'cpu' cannot run:\n  - it was"
    ):
        seqkernels.swap(model, backend="cpu")
    with settings.override(backend="auto"):
        asked = seqkernels.swap(model, backend="reference")
    assert len(asked.replaced) == 2
    assert model.encoder.backend == "reference"


def test_precisions() -> None:
    model = Ranker()
    with pytest.raises(ValueError, match=r"swap: precision: 'fp16' is refused: .*65504.*bf16"):
        seqkernels.swap(model, precision="fp16")
    with pytest.raises(ValueError, match="swap: precision: expected one of bf16, got 'int8'"):
        seqkernels.swap(model, precision="int8")
    assert type(model.encoder) is nn.TransformerEncoder
    seqkernels.swap(model, precision="bf16")
    assert type(model.encoder) is seqkernels.nn.TransformerEncoder


def test_bad_arguments() -> None:
    model = Ranker()
    with pytest.raises(
        ValueError, match="swap: backend: expected one of auto, cuda, triton, cpu, reference"
    ):
        seqkernels.swap(model, backend="gpu")
    with pytest.raises(ValueError, match=re.escape("swap: padded_output: expected None, 'zero'")):
        seqkernels.swap(model, padded_output="nan")


def test_a_model_without_anything_to_replace() -> None:
    report = seqkernels.swap(nn.Sequential(nn.Embedding(2, 2), nn.ReLU()))
    assert not report.replaced
    assert not report.skipped
    assert "nothing that it knows" in str(report)
    report.restore()


def test_where_request_scoring_may_serve_is_told() -> None:
    model = nn.ModuleDict(
        {
            "stock": encoder(),
            "user": seqkernels.nn.UserSequenceEncoder(D // 2, D // 2, HEADS, FF, 1),
            "alone": seqkernels.nn.UserSequenceEncoder(D, 0, HEADS, FF, 1, fusion="none"),
        }
    )
    report = seqkernels.swap(model)
    assert report.request_scoring == ["stock", "user"]
    told = " ".join(str(report).split())
    assert "UserSequenceEncoder.score_candidates computes the user's part once" in told
    assert told.endswith("stock, user")
    assert not seqkernels.swap(nn.Sequential(nn.Linear(4, 4))).request_scoring


def test_encoder_and_decoder_of_a_transformer() -> None:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Transformer(D, HEADS, 1, 1, FF, batch_first=True)

    def call(model: nn.Module, dtype: torch.dtype) -> Tensor:
        source, target = random(2, 5, D, dtype=dtype), random(2, 3, D, dtype=dtype)
        return model(source, target)

    def change(model: nn.Module) -> None:
        report = seqkernels.swap(model)
        assert [r.name for r in report.replaced] == ["encoder"]

    assert_same_function(build, call, change)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_swapped_model_compiles_and_exports() -> None:
    torch._dynamo.reset()
    model = Ranker().eval()
    seqkernels.swap(model)
    expected = score(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ITEMS), expected)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.export.export(model, (ITEMS,), dynamic_shapes=shapes)
    torch.testing.assert_close(score(program.module()), expected)


class Mlp(nn.Module):
    """Norm in front, two chains, a head, and one norm that stands alone."""

    def __init__(self, width: int = 160) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.alone = nn.BatchNorm1d(width)
        self.chain = nn.Sequential(
            nn.Linear(width, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.chain(self.alone(x)))


ALL_BF16 = seqkernels.PrecisionPolicy(bf16=("chain.0",))


def test_norms_linear_layers_and_chains() -> None:
    def change(model: nn.Module) -> None:
        report = seqkernels.swap(model, precision_policy=ALL_BF16)
        assert [(r.name, r.outcome.partition(":")[0]) for r in report.replaced] == [
            ("alone", "replaced, exact"),
            ("chain.0", "bf16"),
            ("chain.1", "replaced, exact"),
            ("chain.5", "replaced, exact"),
            ("chain", "fused"),
        ]
        assert [s.name for s in report.skipped] == ["chain.4", "head"]
        assert "fused: 0 + 1 + 2, 4 + 5 + 6" in str(report)

    assert_same_function(Mlp, lambda m, dtype: m(random(64, 160, dtype=dtype)), change)
    model = Mlp().eval()
    before, state = types(model), copy.deepcopy(model.state_dict())
    report = seqkernels.swap(model, precision_policy=ALL_BF16)
    assert list(model.state_dict()) == list(state)
    report.restore()
    assert types(model) == before
    assert "min_var" not in model.alone.__dict__
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_batch_norm_stays_exact_unless_bounds_are_asked_for() -> None:
    def built() -> Mlp:
        model = Mlp().eval()
        model.alone.running_var[0] = 0.0
        return model

    x = random(5, 160, dtype=torch.float32)
    x[:, 0] = 1e3
    with torch.inference_mode():
        stock = built().alone(x)
        exact = built()
        seqkernels.swap(exact)
        torch.testing.assert_close(exact.alone(x), stock)
        for options, limit in (
            ({"resilient": True}, 10.0),
            ({"max_abs": 3.0}, 3.0),
            ({"min_var": 1.0}, 10.0),
        ):
            bounded = built()
            report = seqkernels.swap(bounded, **options)
            assert bounded.alone.max_abs == limit
            assert f"max_abs={limit:g}" in str(report)
            norm = bounded.alone
            assert (norm(x).abs() <= limit * norm.weight.abs() + norm.bias.abs()).all()
    with pytest.raises(ValueError, match="swap: max_abs: expected a number > 0 or inf, got -1"):
        seqkernels.swap(built(), max_abs=-1.0)


def test_norms_and_linear_layers_that_are_left() -> None:
    class Odd(nn.BatchNorm1d):
        pass

    model = nn.ModuleDict(
        {
            "odd": Odd(4),
            "untracked": nn.BatchNorm1d(4, track_running_stats=False),
            "fp64": nn.BatchNorm1d(4).double(),
            "attention": nn.MultiheadAttention(4, 2),
            "weighted": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        }
    )
    with settings.override(backend="auto"):
        report = seqkernels.swap(model)
    assert not report.replaced
    reasons = {s.name: " ".join(s.reasons) for s in report.skipped}
    assert set(reasons) == {"odd", "untracked", "fp64", "weighted"}
    assert "a subclass of torch.nn.BatchNorm1d" in reasons["odd"]
    assert "no running statistics" in reasons["untracked"]
    assert "it is parametrized" in reasons["weighted"]
    with settings.override(backend="auto"), pytest.raises(BackendUnavailableError, match="odd: it"):
        seqkernels.swap(model, strict=True)


def test_a_swapped_mlp_trains_on() -> None:
    """Back in training mode everything is torch's, and the next evaluation sees the new weights."""
    model, stock = Mlp(), Mlp()
    model.load_state_dict(stock.state_dict())
    for dropout in (model.chain[3], stock.chain[3]):
        dropout.p = 0.0
    seqkernels.swap(model, precision_policy=ALL_BF16)
    x = random(32, 160, dtype=torch.float32)
    for m in (model, stock):
        m.train()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
