"""Reads what the op ``encoder`` needs off torch's encoder modules, or why it cannot be had.

`read_layer` and `read_encoder` run on every call, so that whatever was done to the modules since
the last one (weights, hooks, options, submodules replaced) counts; they are written to take about
two microseconds a layer. The ``*_reasons`` functions find out at leisure why reading failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

Weights = list[Tensor | None]

# Names of this module: an attribute of torch.nn takes twice as long to find on every call.
_Attention = nn.MultiheadAttention
_OutProjection = NonDynamicallyQuantizableLinear
_Linear = nn.Linear
_LayerNorm = nn.LayerNorm
_Dropout = nn.Dropout

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
}
_NEGATIVE_SLOPE = 0.01  # torch's default
_PLAIN_TENSORS = (Tensor, nn.Parameter)

#: The submodules of a layer that the op stands for, by name, with the types it knows.
_PARTS: dict[str, type[nn.Module]] = {
    "self_attn": nn.MultiheadAttention,
    "linear1": nn.Linear,
    "dropout": nn.Dropout,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
    "dropout1": nn.Dropout,
    "dropout2": nn.Dropout,
}


class Layer(NamedTuple):
    """The options of one layer, equal for all layers of an encoder the op can take."""

    nhead: int
    activation: tuple[str, float]
    norm_first: bool
    eps: float
    batch_first: bool
    d_model: int
    dim_feedforward: int


class Encoder(NamedTuple):
    """An encoder as arguments of the op."""

    weights: Weights
    nhead: int
    activation: str
    negative_slope: float
    norm_first: bool
    eps: float
    final_eps: float
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


def read_layer(layer: nn.Module, weights: Weights) -> Layer | None:
    """Append a layer's twelve weights and return its options, or None if the op cannot take it."""
    try:
        parts = layer._modules
        attention: Any = parts["self_attn"]
        linear1: Any = parts["linear1"]
        linear2: Any = parts["linear2"]
        norm1: Any = parts["norm1"]
        norm2: Any = parts["norm2"]
        dropout: Any = parts["dropout"]
        dropout1: Any = parts["dropout1"]
        dropout2: Any = parts["dropout2"]
        out: Any = attention._modules["out_proj"]
        if (
            type(attention) is not _Attention
            or type(out) is not _OutProjection
            or type(linear1) is not _Linear
            or type(linear2) is not _Linear
            or type(norm1) is not _LayerNorm
            or type(norm2) is not _LayerNorm
            or type(dropout) is not _Dropout
            or type(dropout1) is not _Dropout
            or type(dropout2) is not _Dropout
            or attention.training
            or dropout.training
            or dropout1.training
            or dropout2.training
            or norm1.eps != norm2.eps
            or attention.add_zero_attn
            or attention.bias_k is not None
        ):
            return None
        for part in parts.values():
            if part._forward_hooks or part._forward_pre_hooks:  # type: ignore[union-attr]
                return None
        if out._forward_hooks or out._forward_pre_hooks:
            return None
        of_attention, of_out = attention._parameters, out._parameters
        of_linear1, of_linear2 = linear1._parameters, linear2._parameters
        of_norm1, of_norm2 = norm1._parameters, norm2._parameters
        weights += (
            of_attention["in_proj_weight"],
            of_attention["in_proj_bias"],
            of_out["weight"],
            of_out["bias"],
            of_linear1["weight"],
            of_linear1["bias"],
            of_linear2["weight"],
            of_linear2["bias"],
            of_norm1["weight"],
            of_norm1["bias"],
            of_norm2["weight"],
            of_norm2["bias"],
        )
    except (KeyError, AttributeError):
        return None
    activation = activation_name(layer.activation)
    if activation is None:
        return None
    return Layer(
        attention.num_heads,
        activation,
        layer.norm_first,  # type: ignore[arg-type]
        norm1.eps,
        attention.batch_first,
        attention.embed_dim,
        linear1.out_features,
    )


def read_encoder(encoder: nn.Module, layer_types: tuple[type[nn.Module], ...]) -> Encoder | None:
    """A ``TransformerEncoder`` as arguments of the op, or None if the op cannot take it."""
    weights: Weights = []
    options: Layer | None = None
    for layer in encoder._modules["layers"]._modules.values():  # type: ignore[union-attr]
        assert layer is not None
        if type(layer) not in layer_types or layer._forward_hooks or layer._forward_pre_hooks:
            return None
        read = read_layer(layer, weights)
        if read is None or layer.training or (options is not None and options != read):
            return None
        options = read
    if options is None:
        return None
    norm: Any = encoder._modules.get("norm")
    final_eps, outside = options.eps, norm is not None
    if (
        type(norm) is _LayerNorm
        and norm.normalized_shape == (options.d_model,)
        and not (norm._forward_hooks or norm._forward_pre_hooks)
    ):
        weights += (norm._parameters["weight"], norm._parameters["bias"])
        final_eps, outside = norm.eps, False
    return Encoder(
        weights,
        options.nhead,
        *options.activation,
        options.norm_first,
        options.eps,
        final_eps,
        options.batch_first,
        outside,
    )


def hook_reasons(module: nn.Module, path: str) -> list[str]:
    """Why a module may not be replaced by part of an op: it has hooks, or is not plain."""
    reasons = []
    if module._forward_hooks or module._forward_pre_hooks:
        reasons.append(f"{path} has forward hooks, which would not run")
    if module._backward_hooks or module._backward_pre_hooks:
        reasons.append(f"{path} has backward hooks, which would not run")
    if "forward" in module.__dict__:
        reasons.append(f"{path}.forward was replaced on the instance")
    if parametrize.is_parametrized(module):
        reasons.append(f"{path} is parametrized: its weights are computed on each call")
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in _PLAIN_TENSORS:
            reasons.append(f"{path}.{name} is a {type(parameter).__name__}, not a plain tensor")
    return reasons


def layer_reasons(layer: nn.Module, *, path: str = "layer") -> list[str]:
    """Every reason why the op cannot take this layer; empty if it can."""
    reasons = []
    for name, expected in _PARTS.items():
        part = layer._modules.get(name)
        where = f"{path}.{name}"
        if part is None:
            reasons.append(f"{where} is missing")
        elif type(part) is not expected and not parametrize.is_parametrized(part):
            reasons.append(
                f"{where} is a {type(part).__name__}, not a torch.nn.{expected.__name__}"
            )
        else:
            key = "in_proj_weight" if name == "self_attn" else "weight"
            if not name.startswith("dropout") and key not in part._parameters:
                reasons.append(f"{where}.{key} is not a parameter of its own")
    for name, part in layer._modules.items():
        if part is not None:
            reasons += hook_reasons(part, f"{path}.{name}")
    attention: Any = layer._modules.get("self_attn")
    if type(attention) is nn.MultiheadAttention:
        out = attention._modules.get("out_proj")
        if type(out) is not NonDynamicallyQuantizableLinear:
            reasons.append(f"{path}.self_attn.out_proj is a {type(out).__name__}")
        else:
            reasons += hook_reasons(out, f"{path}.self_attn.out_proj")
        if not attention._qkv_same_embed_dim:
            reasons.append(f"{path}.self_attn has different widths of query, key and value")
        if attention.bias_k is not None or attention.bias_v is not None:
            reasons.append(f"{path}.self_attn has add_bias_kv")
        if attention.add_zero_attn:
            reasons.append(f"{path}.self_attn has add_zero_attn")
    norms: list[Any] = [layer._modules.get("norm1"), layer._modules.get("norm2")]
    if all(type(n) is nn.LayerNorm for n in norms) and norms[0].eps != norms[1].eps:
        reasons.append(f"{path}: eps of norm1 and norm2 differ ({norms[0].eps}, {norms[1].eps})")
    activation = getattr(layer, "activation", None)
    if activation_name(activation) is None:
        name = getattr(activation, "__name__", type(activation).__name__)
        reasons.append(
            f"{path}.activation {name!r} is none the kernel knows (relu, gelu, leaky_relu as "
            "torch's functions or modules)"
        )
    return reasons


#: Whether torch.jit.trace is recording.
is_tracing: Callable[[], Any] = torch._C._get_tracing_state


def mode_reasons(module: nn.Module) -> list[str]:
    """Why evaluation is not what this module is set for, or why plain operations are wanted."""
    if module.training:
        return ["the module is in training mode; call .eval()"]
    if is_tracing():
        return ["torch.jit.trace is recording, which cannot record the op"]
    # MultiheadAttention reads its own flag; the others' does not change what they compute.
    inner = sorted(
        name
        for name, part in module.named_modules()
        if part.training and isinstance(part, nn.Dropout | nn.MultiheadAttention)
    )
    return [f"in training mode: {', '.join(inner)}"] if inner else []


def encoder_reasons(encoder: nn.Module, layer_types: tuple[type[nn.Module], ...]) -> list[str]:
    """Every reason why the op cannot take this encoder; empty if it can."""
    reasons = []
    first: Layer | None = None
    layers = list(encoder.layers)  # type: ignore[arg-type]
    if not layers:
        return ["it has no layers"]
    for i, layer in enumerate(layers):
        path = f"layers.{i}"
        if type(layer) not in layer_types:
            reasons.append(
                f"{path} is a {type(layer).__module__}.{type(layer).__qualname__}, "
                "not a torch.nn.TransformerEncoderLayer itself"
            )
            continue
        reasons += hook_reasons(layer, path)
        reasons += layer_reasons(layer, path=path)
        options = _options(layer)
        if options is not None and first is not None and options != first:
            different = [f for f, a, b in zip(Layer._fields, options, first, strict=True) if a != b]
            reasons.append(f"{path} differs from layers.0 in {', '.join(different)}")
        first = first or options
    return reasons


def _options(layer: nn.Module) -> Layer | None:
    """As `read_layer`, without its conditions."""
    parts: dict[str, Any] = dict(layer._modules)
    try:
        return Layer(
            parts["self_attn"].num_heads,
            activation_name(layer.activation) or ("unknown", 0.0),
            bool(layer.norm_first),
            parts["norm1"].eps,
            parts["self_attn"].batch_first,
            parts["self_attn"].embed_dim,
            parts["linear1"].out_features,
        )
    except (AttributeError, KeyError):
        return None
