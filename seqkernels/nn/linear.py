"""Drop-in ``Linear`` that multiplies in bf16, or in fp32 with bits that depend on a row alone."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from seqkernels import backends, ops
from seqkernels.nn import read
from seqkernels.nn.owner import Owner, as_fx_leaf, shallow_clone
from seqkernels.nn.ready import Made, keep, ready_for
from seqkernels.options import PRECISIONS, LinearOptions, check_choice

_NO_NORMS: list[Tensor | None] = [None] * 8


class Linear(Owner, nn.Linear):
    """``torch.nn.Linear`` with bf16 or fp32 operands and fp32 sums in evaluation.

    ::

        y = x W^T + b

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As in ``torch.nn.Linear``.
    precision : str
        ``"bf16"``: ``x`` and the weights are rounded to bf16 where the processor multiplies it (the
        weights everywhere). ``"fp32"``: they are multiplied as they are.
    backend : str
        ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Notes
    -----
    In evaluation the op ``torch.ops.seqkernels.linear`` runs: sums and bias are fp32, and the
    result has the dtype of ``x``. Sums run in the order of the input's features, so a row gets the
    same bits whatever the other rows, its place among them and the number of threads; torch's
    product chooses an order by the number of rows.

    In training, with gradients to record, or with weights that are computed on each call (pruned,
    weight norm, spectral norm), it is torch's; with ``precision="fp32"`` also away from the CPU.
    The weights stay what they are; a packed copy follows their changes.

    Raises
    ------
    ValueError, TypeError
        For options or inputs of the wrong shape, value or kind.

    Examples
    --------
    >>> import torch, seqkernels
    >>> layer = seqkernels.nn.Linear(64, 32).eval()
    >>> with torch.inference_mode():
    ...     layer(torch.randn(5, 64)).shape
    torch.Size([5, 32])
    """

    precision: str
    backend: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str = "bf16",
        backend: str = "auto",
    ) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"Linear: {name}: expected at least 1, got {value}")
        check_choice("Linear: precision", precision, PRECISIONS)
        backends.check_name(backend, "Linear: backend")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.precision, self.backend = precision, backend

    @classmethod
    def from_torch(
        cls, module: nn.Linear, *, precision: str = "bf16", backend: str = "auto"
    ) -> Self:
        """Make one that shares the parameters of torch's, which is left as it is."""
        if type(module) not in (nn.Linear, Linear):
            raise TypeError(
                f"Linear.from_torch: module: expected a torch.nn.Linear, "
                f"got {type(module).__name__}"
            )
        return cls._adopt(shallow_clone(module), backend, precision)

    @classmethod
    def _adopt(cls, module: nn.Module, backend: str, precision: str = "bf16") -> Self:
        """Turn this instance of torch's class, or of this one, into one with these options."""
        check_choice("Linear: precision", precision, PRECISIONS)
        backends.check_name(backend, "Linear: backend")
        module.__class__ = cls
        assert isinstance(module, cls)
        module.precision, module.backend = precision, backend
        return module

    def extra_repr(self) -> str:
        """Show the options torch's class does not have."""
        options = f"precision={self.precision!r}, backend={self.backend!r}"
        return f"{super().extra_repr()}, {options}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Multiply [..., in_features] to [..., out_features]."""
        ready = ready_for(self, input)
        if ready is not None:
            done = ready.run(input)
            if done is not None:
                return done
        node = as_fx_leaf(self, input)
        if node is not None:
            return node  # type: ignore[no-any-return]
        reasons = self.fallback_reasons(input)
        if reasons:
            # Training with gradients is what the definition is for, not a fallback.
            if not (self.training and torch.is_grad_enabled()):
                backends.report_fallback("linear", self.backend, reasons)
            return super().forward(input)
        if self.precision == "fp32" and not input.is_cpu:
            return super().forward(input)
        weights, options = self._arguments()
        out = ops.apply_linear(self, None, input, weights, options, self.backend)
        if isinstance(out, Tensor):
            keep(self, input, (self,), weights, lambda: self._make(input.dtype))
            return out
        backends.report_fallback("linear", self.backend, list(out))
        return super().forward(input)

    def _arguments(self) -> tuple[list[Tensor | None], LinearOptions]:
        return [self.weight, self.bias, *_NO_NORMS], LinearOptions(precision=self.precision)

    def _make(self, dtype: torch.dtype) -> Made:
        weights, options = self._arguments()
        if self.fallback_reasons():
            return None
        return weights, ops.native_linear(self, None, weights, dtype, options, self.backend)

    def fallback_reasons(self, input: Tensor | None = None) -> list[str]:  # noqa: A002
        """Every reason why a call runs the definition; empty if none."""
        reasons = read.mode_reasons(self) + read.computed_weight_reasons(self)
        reasons += read.class_reasons(nn.Linear)
        if input is not None and (input.is_nested or input.layout is not torch.strided):
            reasons.append("its input is a nested or sparse tensor")
        return reasons
