"""Reads what the op ``encoder`` needs off torch's encoder modules, and why it cannot be had.

There is one reader. It runs on every call, so that whatever was done to the modules since the last
one counts: weights, modes, hooks, options, replaced methods and submodules. It appends to `reasons`
all that keeps the op from standing for the modules; `swap` and `explain` ask the same reader. It is
written to take a few microseconds per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from seqkernels.backends.encoder_weights import LAYOUT
from seqkernels.backends.problem import EncoderSize
from seqkernels.options import EncoderOptions

Weights = list[Tensor | None]

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
}
_NEGATIVE_SLOPE = 0.01  # torch's default
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter, type(None)))

#: The submodules of a layer that the op stands for, with the types it knows, and whether their
#: mode changes what they compute.
_PARTS: tuple[tuple[str, type[nn.Module], bool], ...] = (
    ("self_attn", nn.MultiheadAttention, True),
    ("linear1", nn.Linear, False),
    ("dropout", nn.Dropout, True),
    ("linear2", nn.Linear, False),
    ("norm1", nn.LayerNorm, False),
    ("norm2", nn.LayerNorm, False),
    ("dropout1", nn.Dropout, True),
    ("dropout2", nn.Dropout, True),
)
#: The weights of a layer in the op's order, by the submodule that owns them.
_WEIGHTS = (
    ("self_attn", ("in_proj_weight", "in_proj_bias")),
    ("self_attn.out_proj", ("weight", "bias")),
    ("linear1", ("weight", "bias")),
    ("linear2", ("weight", "bias")),
    ("norm1", ("weight", "bias")),
    ("norm2", ("weight", "bias")),
)
_BLOCKS = ("_sa_block", "_ff_block")


class Layer(NamedTuple):
    """The options of one layer, equal for all layers of an encoder the op can take."""

    nhead: int
    activation: tuple[str, float]
    norm_first: bool
    eps: float
    batch_first: bool
    d_model: int
    dim_feedforward: int

    def record(self, final_eps: float) -> EncoderOptions:
        """As the op's options."""
        return EncoderOptions(
            nhead=self.nhead,
            activation=self.activation[0],
            negative_slope=self.activation[1],
            norm_first=self.norm_first,
            layer_norm_eps=self.eps,
            final_norm_eps=final_eps,
        )


class Encoder(NamedTuple):
    """An encoder as arguments of the op."""

    weights: Weights
    options: EncoderOptions  # of the model; those of a call are the module's
    batch_first: bool
    norm_outside: bool  # the final norm is not in the weights: the module applies it itself


def activation_name(activation: Any) -> tuple[str, float] | None:
    """The op's name and slope for an activation, None for one it does not know."""
    if isinstance(activation, nn.Module):
        kind = type(activation)
        if kind is nn.ReLU:
            return "relu", _NEGATIVE_SLOPE
        if kind is nn.GELU:
            return ("gelu_tanh" if activation.approximate == "tanh" else "gelu"), _NEGATIVE_SLOPE
        if kind is nn.LeakyReLU:
            return "leaky_relu", float(activation.negative_slope)  # type: ignore[arg-type]
        return None
    try:
        name = _FUNCTIONS.get(activation)
    except TypeError:  # a callable object that cannot be hashed
        return None
    return None if name is None else (name, _NEGATIVE_SLOPE)


def activation_from_name(name: str) -> Callable[[Tensor], Tensor] | nn.Module:
    """The activation a string stands for in a constructor."""
    made: dict[str, Callable[[], Any]] = {
        "relu": lambda: F.relu,
        "gelu": lambda: F.gelu,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "leaky_relu": nn.LeakyReLU,
    }
    if name not in made:
        raise ValueError(
            f"TransformerEncoderLayer: activation: expected one of {', '.join(made)} or a "
            f"callable, got {name!r}"
        )
    return made[name]()  # type: ignore[no-any-return]


#: Methods that an op stands for: class, name, and the method, None if it was replaced already.
watched: list[tuple[type[nn.Module], str, Any]] = []


def watch(kind: type[nn.Module], *methods: str) -> None:
    """Notice from now on if one of these methods is replaced on the class."""
    for name in methods:
        method = getattr(kind, name)
        # One that is not torch's nor ours was replaced before this package was imported.
        known = method.__module__.partition(".")[0] in ("torch", "seqkernels")
        watched.append((kind, name, method if known else None))


for _kind in (
    *(nn.Linear, nn.LayerNorm, nn.Dropout, nn.MultiheadAttention, nn.TransformerEncoder),
    *(nn.BatchNorm1d, nn.ReLU, nn.GELU, nn.LeakyReLU),
):
    watch(_kind, "forward")
watch(nn.TransformerEncoderLayer, "forward", *_BLOCKS)


def class_reasons(*kinds: type[nn.Module]) -> list[str]:
    """Which methods were replaced on one of these classes, or on any that an op stands for."""
    return [
        f"{kind.__name__}.{name} was replaced on the class"
        for kind, name, method in watched
        if (not kinds or kind in kinds) and getattr(kind, name) is not method
    ]


def watched_hooks() -> list[dict[Any, Any]]:
    """The hooks of the whole process, which keep an op from standing for several modules."""
    everywhere: Any = nn.modules.module
    return [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]


def process_reasons() -> list[str]:
    """Why no op may stand for several modules at present, whichever they are."""
    reasons = class_reasons()
    if any(watched_hooks()):
        reasons.append("global forward hooks are registered, which would not run for submodules")
    return reasons


def module_reasons(module: nn.Module, path: str, *methods: str) -> list[str]:
    """Why an op may not stand for this module: something else than its own forward would run."""
    own = module.__dict__
    reasons = replaced_methods(module, path, "forward", *methods)
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        reasons.append(f"{path} has forward hooks, which would not run")
    return reasons


def replaced_methods(module: nn.Module, path: str, *methods: str) -> list[str]:
    """Which of these methods were replaced on the instance."""
    own = module.__dict__
    return [f"{path}.{name} was replaced on the instance" for name in methods if name in own]


def read_layer(
    layer: nn.Module,
    weights: Weights,
    reasons: list[str],
    *,
    path: str = "layer",
    any_mode: bool = False,
) -> Layer | None:
    """Append a layer's twelve weights, and return its options.

    Parameters
    ----------
    layer : torch.nn.Module
        A ``TransformerEncoderLayer``, torch's or this package's.
    weights : list of Tensor or None
        Gets the weights.
    reasons : list of str
        Gets every reason why the op cannot take the layer.
    path : str
        What the layer is called in the reasons.
    any_mode : bool
        Whether parts in training mode count as if they were not.

    Returns
    -------
    Layer or None
        ``None`` where parts of the layer are missing. To be used only without reasons.
    """
    parts: dict[str, Any] = layer._modules
    for name, kind, has_mode in _PARTS:
        part = parts.get(name)
        if type(part) is not kind:
            reasons.append(_other_part(part, f"{path}.{name}", kind))
        elif has_mode and part.training and not any_mode:
            reasons.append(f"{path}.{name} is in training mode")
    for name, part in parts.items():
        if part is not None:
            reasons += module_reasons(part, f"{path}.{name}")
    attention: Any = parts.get("self_attn")
    out: Any = attention._modules.get("out_proj") if isinstance(attention, nn.Module) else None
    if type(out) is not NonDynamicallyQuantizableLinear:
        kind = NonDynamicallyQuantizableLinear
        reasons.append(_other_part(out, f"{path}.self_attn.out_proj", kind))
    else:
        reasons += module_reasons(out, f"{path}.self_attn.out_proj")
    activation = activation_name(getattr(layer, "activation", None))
    if activation is None:
        reasons.append(_other_activation(layer, path))
    try:
        if not attention._qkv_same_embed_dim:
            reasons.append(f"{path}.self_attn has different widths of query, key and value")
        if attention.bias_k is not None or attention.bias_v is not None:
            reasons.append(f"{path}.self_attn has add_bias_kv")
        if attention.add_zero_attn:
            reasons.append(f"{path}.self_attn has add_zero_attn")
        norm1, norm2 = parts["norm1"], parts["norm2"]
        if norm1.eps != norm2.eps:
            reasons.append(f"{path}: eps of norm1 and norm2 differ ({norm1.eps}, {norm2.eps})")
        parts = parts | {"self_attn.out_proj": out}
        for name, keys in _WEIGHTS:
            own = parts[name]._parameters
            for key in keys:
                if key not in own:
                    reasons.append(f"{path}.{name}.{key} is not a parameter of its own")
                weights.append(own.get(key))
        return Layer(
            attention.num_heads,
            activation or ("unknown", 0.0),
            bool(layer.norm_first),
            norm1.eps,
            attention.batch_first,
            attention.embed_dim,
            parts["linear1"].out_features,
        )
    except (AttributeError, KeyError) as error:  # a part is missing, which is told, or is no part
        if not reasons:
            reasons.append(f"{path} is not laid out as torch's layer: {error}")
        return None


def _other_part(part: nn.Module | None, where: str, expected: type[nn.Module]) -> str:
    if part is None:
        return f"{where} is missing"
    if parametrize.is_parametrized(part):
        return f"{where} is parametrized: its weights are computed on each call"
    return f"{where} is a {type(part).__name__}, not a torch.nn.{expected.__name__}"


def _other_activation(layer: nn.Module, path: str) -> str:
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    return (
        f"{path}.activation {name!r} is none the kernel knows (relu, gelu, leaky_relu as "
        "torch's functions or modules)"
    )


def wants_plain_operations() -> str:
    """Who cannot take the op now and needs the definition instead, "" where nobody does."""
    if torch._C._get_tracing_state():
        return "torch.jit.trace is recording, which cannot record the op"
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return "torch.onnx.export is recording, and ONNX has no such op"
    return ""


def is_traced() -> bool:
    """Whether tensors may stand for others: in graphs that are traced, and under modes."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


def mode_reasons(module: nn.Module) -> list[str]:
    """Why evaluation is not what this module is set for, or why plain operations are wanted."""
    if module.training:
        return ["the module is in training mode; call .eval()"]
    plain = wants_plain_operations()
    return [plain] if plain else []


def weight_reasons(weights: Weights, names: Callable[[int, int], str]) -> list[str]:
    """Why a kernel cannot read these weights."""
    reasons = []
    if not (_PLAIN_TENSORS.issuperset(map(type, weights)) or is_traced()):
        for index, weight in enumerate(weights):
            if type(weight) not in _PLAIN_TENSORS:
                name = names(index, len(weights))
                reasons.append(f"{name} is a {type(weight).__name__}, not a plain tensor")
    first = weights[0]
    if first is not None and first.is_meta:
        reasons.append("its weights are on the meta device (moved there between calls)")
    return reasons


def computed_weight_reasons(module: nn.Module) -> list[str]:
    """Why weight and bias of this module may be others on each call; empty if they are its own.

    What is derived from them, such as packed weights, would be made again on each call then. It is
    so with ``torch.nn.utils.prune``, with ``weight_norm`` and ``spectral_norm`` in the old form and
    in the new one, with every other parametrization, and where somebody assigns plain tensors.
    """
    own = module._parameters
    reasons = []
    if "weight" not in own or "bias" not in own:
        if parametrize.is_parametrized(module):
            reasons.append("it is parametrized: its weights are computed on each call")
        else:
            missing = " and ".join(name for name in ("weight", "bias") if name not in own)
            reasons.append(
                f"its {missing} is no parameter of its own: pruned, normalized or otherwise "
                "computed on each call"
            )
    else:
        names = ("weight", "bias")
        reasons += weight_reasons([own[n] for n in names], lambda i, _: names[i])
    if module._forward_pre_hooks:
        reasons.append("it has forward pre-hooks, which may compute its weights on each call")
    return reasons


def read_encoder(
    encoder: nn.Module,
    layer_types: tuple[type[nn.Module], ...],
    reasons: list[str],
    *,
    any_mode: bool = False,
) -> Encoder | None:
    """A ``TransformerEncoder`` as arguments of the op; see `read_layer`."""
    weights: Weights = []
    options: Layer | None = None
    reasons += process_reasons()
    layers: dict[str, Any] = getattr(encoder._modules.get("layers"), "_modules", {})
    if not layers:
        reasons.append("it has no layers")
        return None
    for name, layer in layers.items():
        path = f"layers.{name}"
        if type(layer) not in layer_types:
            kind = type(layer)
            reasons.append(
                f"{path} is a {kind.__module__}.{kind.__qualname__}, "
                "not a torch.nn.TransformerEncoderLayer itself"
            )
            continue
        reasons += module_reasons(layer, path, *_BLOCKS)
        if layer.training and not any_mode:
            reasons.append(f"{path} is in training mode")
        read = read_layer(layer, weights, reasons, path=path, any_mode=any_mode)
        if read is not None and options is not None and options != read:
            different = [f for f, a, b in zip(Layer._fields, read, options, strict=True) if a != b]
            reasons.append(f"{path} differs from layers.0 in {', '.join(different)}")
        options = options or read
    if options is None:
        return None
    norm: Any = encoder._modules.get("norm")
    final_eps, outside = options.eps, norm is not None
    if (
        type(norm) is nn.LayerNorm
        and norm.normalized_shape == (options.d_model,)
        and not module_reasons(norm, "norm")
    ):
        weights += (norm._parameters["weight"], norm._parameters["bias"])
        final_eps, outside = norm.eps, False
    reasons += weight_reasons(weights, LAYOUT.name)
    return Encoder(weights, options.record(final_eps), options.batch_first, outside)


def read_single_layer(
    layer: nn.Module, reasons: list[str], *, any_mode: bool = False
) -> Encoder | None:
    """A ``TransformerEncoderLayer`` on its own as arguments of the op; see `read_layer`."""
    weights: Weights = []
    reasons += process_reasons()
    reasons += replaced_methods(layer, "layer", *_BLOCKS)  # hooks and forward are its caller's
    read = read_layer(layer, weights, reasons, any_mode=any_mode)
    if read is None:
        return None
    reasons += weight_reasons(weights, lambda i, n: LAYOUT.name(i, n).replace("layers.0", "layer"))
    return Encoder(weights, read.record(read.eps), read.batch_first, False)


def encoder_size(module: nn.Module) -> EncoderSize:
    """The sizes of an encoder, torch's or one of this package."""
    layers: list[Any] = [m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    first = layers[0]
    return EncoderSize(
        first.self_attn.embed_dim,
        first.self_attn.num_heads,
        first.linear1.out_features,
        len(layers),
    )
