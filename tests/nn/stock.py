"""torch's own encoders with the weights of a problem, in the two modes that treat padding apart."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels.testing import EncoderCase, EncoderProblem

ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "leaky_relu": nn.LeakyReLU(),
}


def stock_encoder(
    case: EncoderCase, problem: EncoderProblem, *, nested: bool, batch_first: bool = True
) -> nn.TransformerEncoder:
    """torch's encoder with the problem's weights, in eval mode; without dropout in training."""
    layer = nn.TransformerEncoderLayer(
        case.d_model,
        case.nhead,
        case.dim_feedforward,
        dropout=0.0,
        activation=ACTIVATIONS[case.activation],
        layer_norm_eps=case.layer_norm_eps,
        batch_first=batch_first,
        norm_first=case.norm_first,
        bias=case.bias,
    )
    norm = None
    if case.final_norm:
        norm = nn.LayerNorm(case.d_model, eps=case.final_norm_eps, bias=case.bias)
    encoder = nn.TransformerEncoder(layer, case.num_layers, norm, enable_nested_tensor=nested)
    with torch.no_grad():
        given = [w for w in problem.weights if w is not None]
        for parameter, weight in zip(encoder.parameters(), given, strict=True):
            parameter.copy_(weight)
    return encoder.eval()


def run_stock(encoder: nn.Module, problem: EncoderProblem, dtype: torch.dtype) -> Tensor:
    """torch's encoder in this dtype, in eval mode under inference_mode."""
    mask = problem.key_padding_mask
    with torch.inference_mode():
        result: Tensor = encoder.to(dtype)(problem.x.to(dtype), src_key_padding_mask=mask)
    return result


def golden_and_low(encoder: nn.Module, problem: EncoderProblem) -> tuple[Tensor, Tensor]:
    """Copies of torch's encoder in fp64, the oracle, and in bf16, the yardstick."""
    golden, low = (
        run_stock(copy.deepcopy(encoder), problem, dtype)
        for dtype in (torch.float64, torch.bfloat16)
    )
    return golden, low
