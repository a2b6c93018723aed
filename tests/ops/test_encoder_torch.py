"""The op within torch: opcheck, compile, export, autocast, gradient modes, tracing."""

import copy
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqkernels import backends, ops, reference, settings
from seqkernels.backends.weights import PackedWeights
from seqkernels.options import EncoderOptions
from tests.ops.encoder_call import HEADS, D, arguments, call, weights

IGNORED = torch.arange(7) >= torch.tensor([[7], [3], [0]])
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "two layers, final norm": {"weights": weights(2, final_norm=True), "norm_first": True},
    "no biases": {"weights": [w if i % 2 == 0 else None for i, w in enumerate(weights())]},
    "mask": {"key_padding_mask": IGNORED},
    "float mask": {"key_padding_mask": torch.zeros(3, 7).masked_fill(IGNORED, -torch.inf)},
    "lengths": {"lengths": torch.tensor([7, 3, 0]), "padding": "compute"},
    "length-major": {"x": torch.randn(7, 3, D).transpose(0, 1)},
    "summary": {
        "lengths": torch.tensor([7, 3, 0], dtype=torch.int32),
        "latest_k": 2,
        "pool": "max",
    },
    "concat": {
        "x": torch.randn(3, 7, 16),
        "candidate": torch.randn(3, 8),
        "fusion": "concat",
        "latest_k": 2,
        "pool": "max",
        "padding": "exclude",
        "key_padding_mask": IGNORED,
    },
    "append": {"candidate": torch.randn(3, D), "fusion": "append", "order": "latest_last"},
    "columns apart": {"x": torch.randn(3, D, 7).transpose(1, 2)},
    "one user for all": {"x": torch.randn(1, 7, D).expand(3, 7, D)},
    "one sequence": {"x": torch.randn(1, 7, D)},
    "one event": {"x": torch.randn(3, 1, D)},
    "bf16": {"x": torch.randn(3, 7, D, dtype=torch.bfloat16)},
    "fp64": {"x": torch.randn(3, 7, D, dtype=torch.float64)},
}
BACKENDS = ["auto", "reference"]
# torch's own modules use what it deprecates
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(ops.encoder, tuple(arguments(**CASES[name]).values()))


@pytest.mark.parametrize("name", ["dense", "length-major", "concat"])
def test_opcheck_of_the_reference(name: str) -> None:
    made = arguments(**CASES[name] | {"backend": "reference"})
    torch.library.opcheck(ops.encoder, tuple(made.values()))


@pytest.mark.parametrize("name", ["length-major", "lengths", "concat"])
def test_opcheck_with_gradients(name: str) -> None:
    made = arguments(**CASES[name])
    made["x"] = made["x"].detach().clone().requires_grad_()
    made["weights"] = [
        None if w is None else w.detach().clone().requires_grad_() for w in made["weights"]
    ]
    # Static sizes: dynamic ones would make d_model, a size of parameters, a symbol too.
    tests = ("schema", "autograd_registration", "faketensor", "aot_dispatch_static")
    torch.library.opcheck(
        ops.encoder, tuple(made.values()), test_utils=[f"test_{test}" for test in tests]
    )


@pytest.mark.parametrize("name", CASES)
def test_fake_has_the_strides_of_the_output(name: str) -> None:
    made = arguments(**CASES[name])
    with torch.inference_mode():
        real = ops.encoder(*made.values())
    with torch._subclasses.FakeTensorMode() as mode:
        faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, made)
        fake = torch.ops.seqkernels.encoder(*faked.values())
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_not_written(name: str) -> None:
    made = arguments(**CASES[name])
    before = copy.deepcopy(made)
    with torch.inference_mode():
        result = ops.encoder(*made.values())
    for now, was in zip(
        torch.utils._pytree.tree_leaves(made), torch.utils._pytree.tree_leaves(before), strict=True
    ):
        assert torch.equal(now, was) if isinstance(now, Tensor) else now == was
    assert result.untyped_storage().data_ptr() != made["x"].untyped_storage().data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_gradient_modes_agree(name: str) -> None:
    """Without gradients to record every mode runs the same code."""
    made = arguments(**CASES[name])
    with torch.inference_mode():
        expected = ops.encoder(*made.values())
    with torch.no_grad():
        assert torch.equal(ops.encoder(*made.values()), expected)
    plain = ops.encoder(*made.values())
    assert torch.equal(plain, expected)
    assert not plain.requires_grad
    wants = made | {"x": made["x"].detach().clone().requires_grad_()}
    with torch.no_grad():
        result = ops.encoder(*wants.values())
        assert not result.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_reference(name: str) -> None:
    made = arguments(**CASES[name])
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    made["x"] = leaf(made["x"])
    made["candidate"] = None if made["candidate"] is None else leaf(made["candidate"])
    made["weights"] = [None if w is None else leaf(w) for w in made["weights"]]
    backends.calls.clear()
    result = ops.encoder(*made.values())
    assert dict(backends.calls) == {"reference": 1}
    options = {k: v for k, v in list(made.items())[5:] if k != "backend"}
    expected = reference.encoder(*list(made.values())[:5], **options)
    assert torch.equal(result, expected)
    ones = torch.randn_like(result)
    for ours, theirs in zip(
        torch.autograd.grad(result, leaves, ones, allow_unused=True),
        torch.autograd.grad(expected, leaves, ones, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_any_argument_that_wants_a_gradient_gets_one() -> None:
    made = arguments()
    flat = [w.clone() for w in weights() if w is not None]
    flat[7].requires_grad_()
    result = ops.encoder(*(made | {"weights": flat}).values())
    result.sum().backward()
    assert flat[7].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    made = arguments(x=arguments()["x"].to(dtype), backend=backend, lengths=torch.tensor([7, 3, 0]))
    with torch.inference_mode():
        expected = ops.encoder(*made.values())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = ops.encoder(*made.values())
    assert result.dtype == dtype
    assert torch.equal(result, expected)


class Model(nn.Module):
    """Some use of the op, between other ops unless `bare`."""

    def __init__(self, bare: bool = False, **changes: Any) -> None:
        super().__init__()
        self.bare = bare
        self.others = {k: v for k, v in arguments(**changes).items() if k != "weights"}
        self.flat = nn.ParameterList([w for w in weights(2) if w is not None])

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        others = self.others
        options = [others[k] for k in list(others)[4:]]
        made = (None, list(self.flat), None, lengths, *options)
        return ops.encoder(x, *made) if self.bare else ops.encoder(2 * x, *made).relu()


@pytest.mark.parametrize(
    ("backend", "dynamic", "grad"),
    [
        ("inductor", True, False),
        ("aot_eager", False, False),
        ("aot_eager", False, True),
    ],
)
def test_compile_in_one_graph(backend: str, dynamic: bool, grad: bool) -> None:
    torch._dynamo.reset()
    model = Model(bare=backend == "inductor", latest_k=2, pool="max")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch, length in ((3, 7), (5, 9)) if dynamic else ((3, 7),):
        x = torch.randn(batch, length, D)
        lengths = torch.randint(0, length + 1, (batch,))
        with torch.set_grad_enabled(grad):
            result, expected = compiled(x, lengths), model(x, lengths)
        torch.testing.assert_close(result, expected)
        assert result.requires_grad == grad


def test_compiled_graph_follows_the_parameters() -> None:
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, D)
    with torch.no_grad():
        first = compiled(x)
        model.flat[4].mul_(2.0)
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), first)


@pytest.mark.parametrize(
    ("strict", "layout"), [(False, "batch-major"), (False, "length-major"), (True, "batch-major")]
)
def test_export_with_dynamic_batch_and_length(strict: bool, layout: str) -> None:
    """Exported with gradients enabled, the graph holds the op, and runs it after a round trip."""
    model = Model().eval()

    def draw(batch: int, length: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, length, D)
        if layout == "length-major":
            x = torch.randn(length, batch, D).transpose(0, 1)
        return x, torch.randint(0, length + 1, (batch,))

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"x": {0: batch, 1: length}, "lengths": {0: batch}}
    with settings.override(strict=True):  # nothing falls back while it is exported
        program = torch.export.export(model, draw(3, 7), dynamic_shapes=shapes, strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(ops.encoder) == 1

    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in ((3, 7), (1, 1), (6, 30), (1, 5), (4, 1)):
        example = draw(*size)
        with torch.inference_mode():
            assert torch.equal(loaded(*example), model(*example))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_nothing(backend: str) -> None:
    with torch.inference_mode():
        assert call(x=torch.randn(0, 7, D), backend=backend).shape == (0, 7, D)
        empty = {"x": torch.randn(0, 7, D), "lengths": torch.empty(0, dtype=torch.int64)}
        assert call(**empty, latest_k=2, pool="max", backend=backend).shape == (0, 3 * D)
        alone = call(
            x=torch.randn(2, 0, D), candidate=torch.randn(2, D), fusion="append", backend=backend
        )
        assert alone.shape == (2, 1, D)
        assert alone.isfinite().all()


def test_an_empty_batch_needs_no_kernel_but_legal_arguments() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="last dimension"):
        call(x=torch.randn(0, 7, D + 1))


def test_weights_of_other_dtypes() -> None:
    """Weights may have any floating dtype; a kernel packs them from it."""
    made = arguments()
    with torch.inference_mode(), settings.override(isa="portable"):
        expected = ops.encoder(*made.values())
        double = [None if w is None else w.double() for w in made["weights"]]
        assert torch.equal(ops.encoder(*(made | {"weights": double}).values()), expected)
        apart = [
            None if w is None else torch.stack((w, w), -1)[..., 0] for w in made["weights"]
        ]  # not contiguous
        assert torch.equal(ops.encoder(*(made | {"weights": apart}).values()), expected)


def test_heads_are_an_option_of_the_call_not_of_the_weights() -> None:
    """Options are part of what packed weights are found by."""
    made = arguments()
    with torch.inference_mode():
        two = ops.encoder(*made.values())
        four = ops.encoder(*(made | {"nhead": 2 * HEADS}).values())
        again = ops.encoder(*made.values())
    assert not torch.equal(two, four)
    assert torch.equal(two, again)


class Watcher(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(func)
        return func(*args, **kwargs or {})


class Owner:
    def __init__(self) -> None:
        self._packed = PackedWeights()


def apply(*made: Any) -> Any:
    """As a module calls the op."""
    return ops.apply_encoder(Owner(), *made[:5], EncoderOptions(*made[5:-1]), made[-1])


def test_the_dispatcher_is_passed_by_only_where_nobody_looks() -> None:
    made = tuple(arguments().values())
    with torch.inference_mode():
        expected = ops.encoder(*made)
        assert torch.equal(apply(*made), expected)
        with Watcher() as watcher:
            assert torch.equal(apply(*made), expected)
        assert ops.encoder in watcher.seen
        with torch.profiler.profile() as profile:
            apply(*made)
        assert "seqkernels::encoder" in {event.name for event in profile.events()}
        on_meta = (made[0].to("meta"), None, [w.to("meta") for w in weights() if w is not None])
        assert ops.encoder(*on_meta, *made[3:]).device.type == "meta"
    wants = made[0].clone().requires_grad_()
    assert ops.encoder(wants, *made[1:]).requires_grad
    assert "gradients" in apply(wants, *made[1:])[0]
    with torch.no_grad():
        assert not apply(wants, *made[1:]).requires_grad


def test_wrapper_subclasses_of_weights_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    flat = weights()
    assert flat[4] is not None
    flat[4] = TwoTensor(flat[4], flat[4])
    with (
        torch.inference_mode(),
        pytest.raises(
            TypeError, match=r"expected a plain tensor for layers.0.linear1.weight, got a TwoTensor"
        ),
    ):
        apply(*arguments(weights=flat).values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_padding_that_only_the_device_decides(
    aligned: bool, final_norm: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that the op may not look at gives what one gives that it may."""
    mask = torch.arange(7) >= torch.tensor([[7], [3], [0]])
    made = arguments(
        weights=weights(final_norm=final_norm),
        key_padding_mask=mask if aligned else mask.flip(1),
        backend=backend,
        padding="zero" if aligned else "compute",
    )
    if final_norm:
        made["weights"][-1] = torch.randn(D)
    with torch.inference_mode():
        expected = ops.encoder(*made.values())
        made["padding"] = "stock"
        assert torch.equal(ops.encoder(*made.values()), expected)
        # The module, whose name is that of the op too.
        module = sys.modules["seqkernels.ops.encoder"]
        monkeypatch.setattr(module, "is_plain", lambda _: False)
        assert torch.equal(ops.encoder(*made.values()), expected)
