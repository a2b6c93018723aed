"""One record per op: schema, legal values, and the C++ twin say the same."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch

from seqkernels import options, reference
from seqkernels.backends import native_module
from seqkernels.options import (
    ENCODER_CHOICES,
    SCHEMAS,
    EncoderOptions,
    LinearOptions,
    ResilientBatchNormOptions,
)

native = pytest.mark.skipif(native_module.module is None, reason="there is no native module")
RECORDS: dict[str, Any] = {
    "encoder": EncoderOptions,
    "request_scoring": EncoderOptions,
    "linear": LinearOptions,
    "resilient_batch_norm": ResilientBatchNormOptions,
}


@pytest.mark.parametrize("op", SCHEMAS)
def test_the_schema_ends_in_the_record(op: str) -> None:
    schema = getattr(torch.ops.seqkernels, op).default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[-1] == "backend"
    fields = RECORDS[op]._fields
    assert tuple(names[-1 - len(fields) : -1]) == fields


@native
@pytest.mark.parametrize("op", ["encoder", "linear", "resilient_batch_norm"])
def test_the_twin_in_cpp_has_the_same_fields(op: str) -> None:
    """C++ reads a call's options one after another, so names and order are all there is."""
    twin = native_module.module.option_fields(op)
    assert tuple(name for name, _ in twin) == RECORDS[op]._fields
    for name, known in twin:
        if not known:
            continue
        legal = {"activation": options.ACTIVATIONS, "precision": options.PRECISIONS}.get(name)
        assert tuple(known) == (legal or ENCODER_CHOICES[name])


def test_a_new_option_reaches_every_schema() -> None:
    """What lists options by name or position is the record alone: a field more is an argument."""

    class Longer(NamedTuple):
        nhead: int
        window: int | None = None
        scale: float = 1.0

    assert options.schema_of(Longer) == "int nhead, int? window, float scale"


@pytest.mark.parametrize(
    ("definition", "record"),
    [
        (reference.encoder, EncoderOptions),
        (reference.resilient_batch_norm, ResilientBatchNormOptions),
    ],
)
def test_the_reference_takes_every_option_with_its_default(definition: Any, record: Any) -> None:
    taken = inspect.signature(definition).parameters
    for name in record._fields:
        assert name in taken
        default = record._field_defaults.get(name, inspect.Parameter.empty)
        if name != "max_abs":  # infinity there, None in a schema
            assert taken[name].default == default, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nhead": 5}, "encoder: nhead: expected a divisor of d_model = 8, got 5"),
        ({"activation": "none"}, "encoder: activation: expected one of relu, gelu"),
        ({"padding": "exclude"}, "encoder: padding: 'exclude' needs pool='max'"),
        ({"layer_norm_eps": float("inf")}, "encoder: layer_norm_eps: expected a finite number"),
    ],
)
def test_check(changes: dict[str, Any], message: str) -> None:
    made = EncoderOptions(nhead=2)
    assert made.check(8) is made
    with pytest.raises(ValueError, match=message):
        made._replace(**changes).check(8)
