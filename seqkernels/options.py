"""What a call of an op says beside its tensors: one record per op.

The fields of a record, in their order, are arguments of the op's schema. The C++ twins are in
``csrc/include/seqkernels/options.h``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "leaky_relu")

#: The legal values of an encoder's options that are words.
ENCODER_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": ACTIVATIONS[1:],
    "fusion": ("none", "concat", "append"),
    "padding": ("zero", "compute", "exclude", "stock"),
    "order": ("latest_first", "latest_last"),
    "pool": ("none", "max"),
}
#: What the operands of a product are rounded to: bf16 where the processor multiplies it (the
#: weights everywhere), or nothing.
PRECISIONS = ("bf16", "fp32")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError, in the name of ``<op>: <argument>``, unless `value` is a known one."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def check_finite(op: str, **arguments: float) -> None:
    """Raise ValueError for a number that no exported package could hold."""
    for name, value in arguments.items():
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name}: expected a finite number, got {value}")


def check_bounds(name: str, eps: float, min_var: float, max_abs: float) -> None:
    """Raise ValueError, in the name of the caller, for numbers that are none of a norm's."""
    for argument, value in (("eps", eps), ("min_var", min_var)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: {argument}: expected a finite number >= 0, got {value}")
    if not max_abs > 0:
        raise ValueError(f"{name}: max_abs: expected a number > 0 or inf, got {max_abs}")


class EncoderOptions(NamedTuple):
    """Options of the ops ``encoder`` and ``request_scoring``."""

    nhead: int
    activation: str = "relu"
    negative_slope: float = 0.01
    norm_first: bool = False
    layer_norm_eps: float = 1e-5
    final_norm_eps: float = 1e-5
    fusion: str = "none"
    padding: str = "zero"
    order: str = "latest_first"
    latest_k: int | None = None
    pool: str = "none"

    def check(self, d_model: int) -> EncoderOptions:
        """Raise ValueError unless the options are legal, and go with each other and `d_model`."""
        check_heads(d_model, self.nhead)
        for name, known in ENCODER_CHOICES.items():
            check_choice(f"encoder: {name}", getattr(self, name), known)
        self._check_summary()
        numbers = ("negative_slope", "layer_norm_eps", "final_norm_eps")
        check_finite("encoder", **{name: getattr(self, name) for name in numbers})
        return self

    def _check_summary(self) -> None:
        low = int(self.pool == "none")
        if self.latest_k is None:
            if self.pool != "none":
                raise ValueError(
                    f"encoder: pool: expected 'none' without latest_k, got {self.pool!r}"
                )
        elif self.latest_k < low:
            raise ValueError(
                f"encoder: latest_k: expected at least {low} with pool={self.pool!r}, "
                f"got {self.latest_k}"
            )
        if self.padding == "exclude" and self.pool != "max":
            raise ValueError(
                f"encoder: padding: 'exclude' needs pool='max', got pool={self.pool!r}"
            )
        if self.padding == "stock" and (self.fusion != "none" or self.latest_k is not None):
            raise ValueError(
                "encoder: padding: 'stock' needs fusion='none' and latest_k=None, "
                f"got fusion={self.fusion!r} and latest_k={self.latest_k}"
            )


class ResilientBatchNormOptions(NamedTuple):
    """Options of the op ``resilient_batch_norm``.

    ``max_abs`` is None where there is no bound: a package of AOTInductor cannot hold infinity.
    """

    eps: float = 1e-5
    min_var: float = 0.0
    max_abs: float | None = None
    activation: str = "none"
    negative_slope: float = 0.01

    def check(self) -> ResilientBatchNormOptions:
        """Raise ValueError unless the options are legal."""
        op = "resilient_batch_norm"
        check_bounds(op, self.eps, self.min_var, limit_of(op, self.max_abs))
        check_finite(op, negative_slope=self.negative_slope)
        check_choice(f"{op}: activation", self.activation, ACTIVATIONS)
        return self


class LinearOptions(NamedTuple):
    """Options of the op ``linear``.

    ``input_norm`` and ``output_norm`` hold eps, min_var and, where there is a bound, max_abs; they
    are empty where there is no norm.
    """

    input_norm: tuple[float, ...] = ()
    output_norm: tuple[float, ...] = ()
    activation: str = "none"
    negative_slope: float = 0.01
    precision: str = "bf16"

    def check(self, has_input_norm: bool, has_output_norm: bool) -> LinearOptions:
        """Raise ValueError unless the options are legal and go with the norms that there are."""
        _check_norm("linear: input_norm", self.input_norm, has_input_norm)
        _check_norm("linear: output_norm", self.output_norm, has_output_norm)
        check_finite("linear", negative_slope=self.negative_slope)
        check_choice("linear: activation", self.activation, ACTIVATIONS)
        check_choice("linear: precision", self.precision, PRECISIONS)
        return self


def check_heads(d_model: int, nhead: int) -> None:
    """Raise ValueError unless `nhead` divides `d_model`."""
    if nhead < 1 or d_model % nhead:
        raise ValueError(f"encoder: nhead: expected a divisor of d_model = {d_model}, got {nhead}")


def limit_of(name: str, max_abs: float | None) -> float:
    """The bound that an op's argument stands for: infinity where it is None."""
    if max_abs == math.inf:
        raise ValueError(
            f"{name}: max_abs: expected a finite number > 0, or None for no bound, got inf"
        )
    return math.inf if max_abs is None else max_abs


def _check_norm(name: str, numbers: tuple[float, ...], there: bool) -> None:
    if len(numbers) not in ((2, 3) if there else (0,)):
        expected = "(eps, min_var)" if there else "nothing, as its tensors are None"
        more = " or (eps, min_var, max_abs)" if there else ""
        raise ValueError(f"{name}: expected {expected}{more}, got {numbers}")
    if there:
        eps, min_var, *bound = numbers
        check_bounds(name, eps, min_var, limit_of(name, bound[0] if bound else None))


_SCHEMA_TYPES: dict[Any, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    int | None: "int?",
    float | None: "float?",
    tuple[float, ...]: "float[]",
}


@lru_cache
def schema_of(record: type[Any]) -> str:
    """The record's fields as arguments of a schema."""
    hints = get_type_hints(record)
    return ", ".join(f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in record._fields)


_ENCODER = schema_of(EncoderOptions)
_LINEAR = schema_of(LinearOptions)
_NORM = schema_of(ResilientBatchNormOptions)

#: The ops, which every installation has. ``backend`` is the name of one, or "auto".
SCHEMAS = {
    "encoder": "(Tensor x, Tensor? candidate, Tensor?[] weights, Tensor? key_padding_mask, "
    f"Tensor? lengths, {_ENCODER}, str backend) -> Tensor",
    "request_scoring": "(Tensor events, Tensor candidates, Tensor user_index, Tensor?[] weights, "
    f"Tensor? key_padding_mask, Tensor? lengths, {_ENCODER}, str backend) -> Tensor",
    "linear": f"(Tensor x, Tensor?[] weights, {_LINEAR}, str backend) -> Tensor",
    "resilient_batch_norm": "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    f"{_NORM}, str backend) -> Tensor",
}

_PACKED_CALL = (
    "Tensor x, Tensor? candidate, Tensor? user_index, Tensor? key_padding_mask, Tensor? lengths, "
    "Tensor? computes_padding, Tensor model, Tensor packed"
)
#: The native kernels on weights that are packed once. ``pack_<op>`` returns what stands beside the
#: packed weights (sizes and options, in host memory) and them; ``<op>_packed`` runs a call.
NATIVE_SCHEMAS = {
    "pack_encoder": f"(Tensor?[] weights, {_ENCODER}, str isa) -> (Tensor model, Tensor packed)",
    "pack_encoder_cuda": f"(Tensor?[] weights, {_ENCODER}) -> (Tensor model, Tensor packed)",
    "encoder_packed": f"({_PACKED_CALL}) -> Tensor",
    "encoder_packed.out": f"({_PACKED_CALL}, *, Tensor(a!) out) -> Tensor(a!)",
    "encoder_workspace_bytes": "(Tensor model, int tokens) -> int",
    "pack_linear": f"(Tensor?[] weights, {_LINEAR}, str isa) -> (Tensor model, Tensor packed)",
    "linear_packed": "(Tensor x, Tensor model, Tensor packed) -> Tensor",
    "pack_resilient_batch_norm": "(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    f"{_NORM}, str isa) -> (Tensor model, Tensor packed)",
    "resilient_batch_norm_cuda": "(Tensor x, Tensor mean, Tensor var, Tensor? weight, "
    f"Tensor? bias, {_NORM}) -> Tensor",
    "resilient_batch_norm_packed": "(Tensor x, Tensor model, Tensor packed) -> Tensor",
}

if __name__ == "__main__":  # what csrc/torch/library.cpp includes
    import sys
    from pathlib import Path

    for file, schemas in (("schemas", SCHEMAS), ("native_schemas", NATIVE_SCHEMAS)):
        lines = [f'{{"{op}", "{op}{schema}"}},\n' for op, schema in schemas.items()]
        Path(sys.argv[1], f"{file}.inc").write_text("".join(lines))
