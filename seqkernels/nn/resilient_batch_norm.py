"""Drop-in ``BatchNorm1d`` whose output stays bounded, whatever its statistics and input hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from seqkernels import backends, ops
from seqkernels.nn import read
from seqkernels.nn.batch_norm_health import BatchNormHealth, examine
from seqkernels.nn.owner import Owner, as_fx_leaf, shallow_clone
from seqkernels.nn.ready import Made, keep, ready_for
from seqkernels.ops.resilient_batch_norm import check_x
from seqkernels.options import ResilientBatchNormOptions, check_bounds
from seqkernels.reference import resilient_batch_norm as reference
from seqkernels.reference.resilient_batch_norm import batch_statistics, is_bounded

_log = logging.getLogger("seqkernels")
_NAME = "ResilientBatchNorm1d"
_LOW = (torch.bfloat16, torch.float16)
_told_of_skipped_batch = False


def _check_options(eps: float, min_var: float, max_abs: float, backend: str) -> None:
    check_bounds(_NAME, eps, min_var, max_abs)
    backends.check_name(backend, f"{_NAME}: backend")


class ResilientBatchNorm1d(Owner, nn.BatchNorm1d):
    """Batch norm within bounds; ``torch.nn.BatchNorm1d`` where there are none.

    ::

        z = (x - mean) / sqrt(max(var, min_var) + eps);   y = weight * clamp(z, -max_abs, max_abs) \
+ bias

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As in ``torch.nn.BatchNorm1d``. Parameters and statistics are fp32 (fp64 with
        ``dtype=torch.float64``), also for a lower ``dtype``.
    min_var : float
        Variances below it count as this one: a feature that was (nearly) constant in training is
        multiplied by at most ``1 / sqrt(min_var + eps)``. The default allows a factor of 95; torch
        allows 316 with its ``eps``. It suits features of ordinary scale; ``0`` for none.
    max_abs : float
        Bound of the normalized value. The default, ten standard deviations, cuts off next to
        nothing of what was seen in training; ``math.inf`` for none.
    backend : str
        ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Notes
    -----
    With a bound, ``|y| <= max_abs * |weight| + |bias|`` for any input: NaN counts as the mean,
    infinities are clamped, and a channel whose statistics are not finite, or whose variance is
    negative, gives ``bias``. With ``min_var=0, max_abs=inf`` the module computes what torch's does,
    propagation of NaN included.

    In evaluation the op ``torch.ops.seqkernels.resilient_batch_norm`` runs, on ``x`` as it is:
    fp32 or bf16, the mean taken off in fp32 before anything is rounded. Batch statistics (in
    training, and without running ones) run in plain PyTorch. Training is torch's: the running
    variance is unbiased, ``momentum=None`` averages all batches. One thing differs, with bounds and
    without: a batch in which the statistics of any channel are not finite enters neither the
    running statistics nor ``num_batches_tracked``, which is told once. An empty batch is such a
    one.

    The state dict is that of ``BatchNorm1d`` and ``SyncBatchNorm``. Parameters and statistics stay
    fp32 through ``.bfloat16()``, ``.half()`` and ``.to(dtype)``.

    Raises
    ------
    ValueError, TypeError
        For options or inputs of the wrong shape, value or kind.

    Examples
    --------
    >>> import torch, seqkernels
    >>> norm = seqkernels.nn.ResilientBatchNorm1d(3).eval()
    >>> norm.running_var[1] = 0.0  # constant in training
    >>> with torch.inference_mode():
    ...     norm(torch.tensor([[0.0, 0.25, float("nan")], [1.0, -2.0, 1e30]]))
    tensor([[  0.0000,  10.0000,   0.0000],
            [  1.0000, -10.0000,  10.0000]])
    """

    min_var: float
    max_abs: float
    backend: str

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        min_var: float = 1e-4,
        max_abs: float = 10.0,
        backend: str = "auto",
    ) -> None:
        if num_features < 1:
            raise ValueError(f"{_NAME}: num_features: expected at least 1, got {num_features}")
        _check_options(eps, min_var, max_abs, backend)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        # Older versions of torch do not have the argument.
        more: dict[str, Any] = {} if bias else {"bias": False}
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            torch.float32 if dtype in _LOW else dtype,
            **more,
        )
        self.min_var, self.max_abs, self.backend = min_var, max_abs, backend

    @classmethod
    def from_torch(
        cls,
        module: nn.BatchNorm1d | nn.SyncBatchNorm,
        *,
        min_var: float = 0.0,
        max_abs: float = math.inf,
        backend: str = "auto",
    ) -> Self:
        """Make one that shares the parameters and statistics of torch's.

        Parameters
        ----------
        module : torch.nn.BatchNorm1d or torch.nn.SyncBatchNorm
            Of exactly this class; it is left as it is. A ``SyncBatchNorm`` becomes one that takes
            the statistics of its own process when it is trained further, and that takes [N, C, *],
            of any number of dimensions, as it did.
        min_var, max_abs : float
            Bounds; by default none, so that the module computes what torch's does.
        backend : str
            As in the constructor.
        """
        if type(module) not in TYPES:
            raise TypeError(
                f"{_NAME}.from_torch: module: expected a torch.nn.BatchNorm1d or SyncBatchNorm, "
                f"got {type(module).__name__}"
            )
        return cls._adopt(shallow_clone(module), min_var, max_abs, backend)

    @classmethod
    def _adopt(cls, module: nn.Module, min_var: float, max_abs: float, backend: str) -> Self:
        """Turn this instance of torch's class into one of this class; its tensors stay its own."""
        _check_options(module.eps, min_var, max_abs, backend)  # type: ignore[arg-type]
        module.__class__ = cls
        assert isinstance(module, cls)
        module.min_var, module.max_abs, module.backend = min_var, max_abs, backend
        return module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize [N, C] or [N, C, L]; what was a ``SyncBatchNorm`` takes [N, C, *]."""
        ready = ready_for(self, input)
        if ready is not None:
            done = ready.run(input)
            if done is not None:
                return done
        node = as_fx_leaf(self, input)
        if node is not None:
            return node  # type: ignore[no-any-return]
        if read.class_reasons(nn.BatchNorm1d):
            return super().forward(input)
        if input.dim() > 3 and hasattr(self, "process_group"):  # an attribute of SyncBatchNorm
            return self.forward(input.flatten(2)).view(input.shape)
        if not self.fallback_reasons():
            tensors, options = self._arguments()
            out = ops.apply_resilient_batch_norm(input, *tensors, options, self.backend)
            if isinstance(out, Tensor):
                # torch's own batch norm, which may share the statistics, updates them uncounted.
                make = partial(self._make, input.dtype)
                keep(self, input, (self,), tensors, make, by_contents=True)
                return out
            backends.report_fallback("resilient_batch_norm", self.backend, list(out))
            return super().forward(input)
        check_x(_NAME, input, self.num_features)
        reasons = self.fallback_reasons()
        # Training with gradients is what the definition is for, not a fallback.
        if not (self.training and torch.is_grad_enabled()):
            backends.report_fallback("resilient_batch_norm", self.backend, reasons)
        with torch.autocast(input.device.type, enabled=False):
            return self._definition(input)

    def _arguments(
        self,
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], ResilientBatchNormOptions]:
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        options = ResilientBatchNormOptions(self.eps, self.min_var, finite(self.max_abs))
        return (mean, var, self.weight, self.bias), options

    def _make(self, dtype: torch.dtype) -> Made:
        if self.fallback_reasons():
            return None
        tensors, options = self._arguments()
        return tensors, ops.native_norm(tensors, dtype, options, self.backend)

    def fallback_reasons(self) -> list[str]:
        """Every reason why a call runs the definition; empty if none."""
        reasons = read.mode_reasons(self)
        if self.running_mean is None or self.running_var is None:
            reasons.append("there are no running statistics (track_running_stats=False)")
        return reasons

    def health(self) -> BatchNormHealth:
        """Say which channels have running statistics that normalize nothing, or explode.

        Returns
        -------
        BatchNormHealth
            ``channels`` (index, kind, mean, variance) and ``counts`` by kind; ``str()`` is a table.

        Examples
        --------
        >>> import torch, seqkernels
        >>> norm = seqkernels.nn.ResilientBatchNorm1d(4)
        >>> norm.running_var[2] = 0.0
        >>> norm.health().counts
        {'zero variance': 1}
        """
        return examine(self, self.min_var)

    def extra_repr(self) -> str:
        """Show the options torch's class does not have."""
        bounds = f"min_var={self.min_var}, max_abs={self.max_abs}, backend={self.backend!r}"
        return f"{super().extra_repr()}, {bounds}"  # type: ignore[no-untyped-call]

    def _definition(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training or mean is None or var is None:
            if x.numel() == self.num_features:
                raise ValueError(
                    f"{_NAME}: x: expected more than 1 value per channel for batch statistics, "
                    f"got shape {tuple(x.shape)}"
                )
            mean, var = batch_statistics(x, bounded=is_bounded(self.min_var, self.max_abs))
            if self.training and self.track_running_stats:
                self._track(mean.detach(), var.detach(), x.numel() // self.num_features)
        return reference(
            x,
            mean,
            var,
            self.weight,
            self.bias,
            eps=self.eps,
            min_var=self.min_var,
            max_abs=self.max_abs,
        )

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Enter a batch of `count` values a channel into the running statistics, if finite."""
        running_mean, running_var = self.running_mean, self.running_var
        if running_mean is None or running_var is None:
            return
        finite = mean.isfinite() & var.isfinite()
        enters = finite.all()
        if not torch.compiler.is_compiling() and x_is_local(mean) and not bool(enters) and count:
            _tell_of_skipped_batch(finite)
        batches = self.num_batches_tracked
        if batches is not None:
            batches.add_(enters)
        if self.momentum is not None:
            share: float | Tensor = self.momentum
        elif batches is not None:
            share = 1.0 / batches.clamp(min=1).to(mean.dtype)
        else:
            share = 0.0
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            moved = (1 - share) * running + share * new
            running.copy_(torch.where(enters, moved.to(running.dtype), running))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch.nn, but a cast to 16 bits leaves parameters and statistics in fp32."""

        def keep(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            if made.dtype not in _LOW or not tensor.is_floating_point():
                return made
            return tensor.to(made.device, torch.float32)

        return super()._apply(keep, recurse)


def finite(max_abs: float) -> float | None:
    """A module's bound as the ops take it."""
    return None if max_abs == math.inf else max_abs


#: What is adopted: exactly one of these.
TYPES: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.SyncBatchNorm, ResilientBatchNorm1d)


def x_is_local(tensor: Tensor) -> bool:
    """Whether looking at a value costs nothing: elsewhere it would wait for the device."""
    return tensor.device.type == "cpu"


def _tell_of_skipped_batch(finite: Tensor) -> None:
    global _told_of_skipped_batch
    if _told_of_skipped_batch:
        return
    _told_of_skipped_batch = True
    channels = (~finite).nonzero().flatten().tolist()
    shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
    _log.warning(
        "resilient_batch_norm: a batch does not enter the running statistics: those of its "
        "channels %s are not finite; further ones are not told of",
        shown,
    )
