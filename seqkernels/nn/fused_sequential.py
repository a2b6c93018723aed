"""``Sequential`` whose chains of linear layers, batch norms and activations run as one op each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels import backends, ops
from seqkernels.backends.linear_weights import LAYOUT, OUTPUT_NORM
from seqkernels.backends.weights import recheck_weights
from seqkernels.nn import read
from seqkernels.nn.linear import Linear
from seqkernels.nn.owner import Owner
from seqkernels.nn.resilient_batch_norm import ResilientBatchNorm1d, finite
from seqkernels.ops.library import NEEDS_GRADIENT, is_eager, nobody_listens, records_gradients
from seqkernels.options import LinearOptions, ResilientBatchNormOptions
from seqkernels.reference.linear import ChannelNorm, fold_norm, fold_reasons
from seqkernels.reference.resilient_batch_norm import activate

_NO_NORM: list[Tensor | None] = [None] * 4
Members = Sequence[tuple[str, nn.Module | None]]


@dataclass(frozen=True)
class Step:
    """Consecutive members of a `FusedSequential` that run together.

    Attributes
    ----------
    names : tuple of str
        Of the members, activation and dropout included.
    kind : str
        ``"bf16"``, ``"fp32"``: product, the norms around it and the activation as one op, with
        these operands; ``"torch"``: torch's product with the norm folded into its weights, or
        behind it where that may not be; ``"norm"``: batch norm and activation as one op;
        ``"module"``: a member as it is.
    input_norm, linear, output_norm, activation : torch.nn.Module or None
        Their parts; a ``"module"`` is in ``linear``.
    """

    names: tuple[str, ...]
    kind: str
    input_norm: ResilientBatchNorm1d | None = None
    linear: nn.Module | None = None
    output_norm: ResilientBatchNorm1d | None = None
    activation: nn.Module | None = None

    @property
    def fused(self) -> bool:
        """Whether it is more than one member."""
        return self.kind != "module" and len(self.names) > 1


class FusedSequential(Owner, nn.Sequential):
    """``torch.nn.Sequential`` with its chains fused in evaluation.

    Wherever these follow each other they run as one op, without their intermediate results::

        [norm ->] Linear [-> norm] [-> activation]         norm [-> activation]

    with norm a `ResilientBatchNorm1d`, Linear this package's or torch's, and activation torch's
    ReLU, GELU or LeakyReLU module. Around this package's `Linear` norms work on the fp32 sums and
    on the unrounded input; an exact norm behind torch's Linear is folded into its weights.

    Notes
    -----
    `swap` makes them of ``torch.nn.Sequential``. The state dict, indexing and iteration are
    torch's. Members run one by one where a chain may not be fused: in training, with hooks on a
    member, for 3-D input (a batch norm's channels are not the last dimension there), without
    running statistics; `reasons` tells. A norm is not folded if it has bounds, or statistics that
    are not finite, or stands in front of the product: its mean has to be taken off before the
    product rounds.

    Examples
    --------
    >>> import torch, seqkernels
    >>> norm = seqkernels.nn.ResilientBatchNorm1d(32)
    >>> mlp = seqkernels.nn.FusedSequential(seqkernels.nn.Linear(64, 32), norm, torch.nn.ReLU())
    >>> [step.names for step in mlp.eval().steps()]
    [('0', '1', '2')]
    >>> with torch.inference_mode():
    ...     mlp(torch.randn(5, 64)).shape
    torch.Size([5, 32])
    """

    @classmethod
    def _adopt(cls, module: nn.Module) -> FusedSequential:
        """Turn this instance of torch's class into one of this class."""
        module.__class__ = cls
        assert isinstance(module, cls)
        return module

    def steps(self, *, any_mode: bool = False) -> list[Step]:
        """How the members are grouped for 2-D input, as they are now.

        Parameters
        ----------
        any_mode : bool
            Whether members in training mode count as if they were not.
        """
        members: Members = list(self._modules.items())
        steps = []
        at = 0
        while at < len(members):
            step = _step(members, at, any_mode)
            steps.append(step)
            at += len(step.names)
        return steps

    def reasons(self, x: Tensor | None = None) -> list[str]:
        """Every reason why a call with this input runs its members one by one; empty if none."""
        reasons = read.process_reasons()
        if x is not None and x.dim() != 2:
            reasons.append(f"{x.dim()}-D input: a batch norm's channels are its dimension 1")
        if self.training:
            reasons.append("the module is in training mode; call .eval()")
        plain = read.wants_plain_operations()
        if plain:
            reasons.append(plain)
        for name, member in self._modules.items():
            if isinstance(member, nn.Linear | nn.modules.batchnorm._BatchNorm):
                reasons += read.module_reasons(member, name)
            if member.training and isinstance(member, nn.modules.batchnorm._BatchNorm):
                reasons.append(f"{name} is in training mode")
            elif isinstance(member, ResilientBatchNorm1d) and member.running_mean is None:
                reasons.append(f"{name} has no running statistics")
        return reasons

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Run the members, chains as one."""
        if (
            self.training
            or read.wants_plain_operations()
            or not isinstance(input, Tensor)
            or input.is_nested
            or input.layout is not torch.strided
            or input.dim() != 2
            or read.process_reasons()
        ):
            return super().forward(input)  # type: ignore[no-any-return, no-untyped-call]
        x = input
        for step in self.steps():
            # Where a member has changed the shape a norm's channels are no longer the last ones.
            fits = step.kind == "module" or (x.dim() == 2 and (x.is_cpu or step.kind != "fp32"))
            out = _run(self, step, x) if fits else ()
            if not isinstance(out, Tensor):
                if out:  # why torch's modules are faster
                    backends.report_fallback("linear", "auto", list(out))
                out = x
                for name in step.names:
                    out = self._modules[name](out)
            x = out
        return x


def _plain(module: nn.Module | None) -> bool:
    """Whether nothing but its own forward would run for it."""
    return module is not None and not read.module_reasons(module, "")


def _norm(module: nn.Module | None, any_mode: bool) -> ResilientBatchNorm1d | None:
    if (
        type(module) is ResilientBatchNorm1d
        and (any_mode or not module.training)
        and module.running_mean is not None
        and _plain(module)
    ):
        return module
    return None


def _step(members: Members, first: int, any_mode: bool) -> Step:
    """The longest chain that starts at a member."""

    def member(i: int) -> nn.Module | None:
        return members[i][1] if i < len(members) else None

    def is_linear(module: nn.Module | None) -> bool:
        if type(module) not in (nn.Linear, Linear) or not _plain(module):
            return False
        assert module is not None
        return (any_mode or not module.training) and not read.computed_weight_reasons(module)

    at = first
    input_norm = _norm(member(at), any_mode)
    if input_norm is not None and type(member(at + 1)) is Linear and is_linear(member(at + 1)):
        at += 1
    elif input_norm is not None:
        activation = _activation(member(at + 1))
        end = at + (1 if activation is None else 2)
        return Step(_names(members, first, end), "norm", None, None, input_norm, activation)
    linear = member(at)
    if not is_linear(linear):
        return Step(_names(members, first, first + 1), "module", linear=member(first))
    at += 1
    output_norm = _norm(member(at), any_mode)
    if type(linear) is nn.Linear and output_norm is None:
        return Step(_names(members, first, first + 1), "module", linear=linear)
    at += output_norm is not None
    activation = _activation(member(at))
    at += activation is not None
    kind = linear.precision if type(linear) is Linear else "torch"
    return Step(_names(members, first, at), kind, input_norm, linear, output_norm, activation)


def _names(members: Members, first: int, end: int) -> tuple[str, ...]:
    return tuple(name for name, _ in members[first:end])


def _activation(module: nn.Module | None) -> nn.Module | None:
    known = isinstance(module, nn.Module) and read.activation_name(module) is not None
    return module if known and _plain(module) else None


def channel_norm(norm: ResilientBatchNorm1d) -> ChannelNorm:
    """A module's statistics and numbers."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    return ChannelNorm(mean, var, norm.weight, norm.bias, norm.eps, norm.min_var, norm.max_abs)


def _norm_arguments(
    norm: ResilientBatchNorm1d | None,
) -> tuple[list[Tensor | None], tuple[float, ...]]:
    if norm is None:
        return _NO_NORM, ()
    tensors = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    bound = finite(norm.max_abs)
    return tensors, (norm.eps, norm.min_var, *(() if bound is None else (bound,)))


def _run(owner: FusedSequential, step: Step, x: Tensor) -> Tensor | Sequence[str]:
    linear: Any = step.linear
    if step.kind == "module":
        return linear(x)  # type: ignore[no-any-return]
    activation = ("none", 0.01)
    if step.activation is not None:
        activation = read.activation_name(step.activation) or activation
    behind, numbers = _norm_arguments(step.output_norm)
    if step.kind == "norm":
        norm: Any = step.output_norm
        return _apply_norm(x, behind, numbers, activation, norm)
    before, before_numbers = _norm_arguments(step.input_norm)
    weights = [linear.weight, linear.bias, *before, *behind]
    if step.kind != "torch":
        options = LinearOptions(before_numbers, numbers, *activation, linear.precision)
        return ops.apply_linear(owner, step.names, x, weights, options, linear.backend)
    return _torch_product(owner, x, weights, numbers, activation, step)


def _torch_product(
    owner: FusedSequential,
    x: Tensor,
    weights: list[Tensor | None],
    numbers: tuple[float, ...],
    activation: tuple[str, float],
    step: Step,
) -> Tensor | Sequence[str]:
    """Torch's product, with the norm folded into its weights, once as long as they stay, if legal.

    Under a tracer nothing is kept between calls: there the norm runs.
    """
    linear, norm = step.linear, step.output_norm
    assert linear is not None
    assert norm is not None
    if is_eager(x):
        if records_gradients(x, *weights):
            recheck_weights()  # a step of an optimizer may follow
            return (NEEDS_GRADIENT,)
        problem = backends.Problem("resilient_batch_norm", x.device.type, x.dtype)
        choice, _ = backends.choose(problem, norm.backend)
        declined = backends.declined(choice)
        if declined:
            return declined
    if nobody_listens(x):
        weight_set = owner._packed.lookup(LAYOUT, weights, step.names)
        folded = weight_set.derived(("fold", *numbers), _fold, norm, weights)
        if isinstance(folded, tuple):
            return activate("linear", F.linear(x, *folded), *activation)
    y: Tensor = linear(x)
    return _apply_norm(y, weights[OUTPUT_NORM], numbers, activation, norm)


def _apply_norm(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: tuple[float, ...],
    activation: tuple[str, float],
    norm: ResilientBatchNorm1d,
) -> Tensor | Sequence[str]:
    mean, var, weight, bias = tensors
    assert mean is not None
    assert var is not None
    eps, min_var, *bound = numbers
    options = ResilientBatchNormOptions(eps, min_var, bound[0] if bound else None, *activation)
    return ops.apply_resilient_batch_norm(x, mean, var, weight, bias, options, norm.backend)


def _fold(
    norm: ResilientBatchNorm1d, weights: list[Tensor | None]
) -> tuple[Tensor, Tensor] | list[str]:
    """The folded weight and bias, or why there are none."""
    weight, bias = weights[:2]
    assert weight is not None
    reasons = fold_reasons(channel_norm(norm))
    return reasons or fold_norm(
        weight.detach(), None if bias is None else bias.detach(), channel_norm(norm)
    )
