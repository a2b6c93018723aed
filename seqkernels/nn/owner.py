"""What the modules of this package have in common: packed weights, and tools that read modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

from torch import Tensor, fx, nn

from seqkernels.backends.weights import PackedWeights, recheck_weights

_M = TypeVar("_M", bound=nn.Module)


class Owner(nn.Module):
    """A module that owns what backends derive from its weights."""

    @property
    def _packed(self) -> PackedWeights:
        """Made when first asked for, so that a module that changed its class has one too."""
        own = self.__dict__
        packed: PackedWeights | None = own.get("_packed_weights")
        if packed is None:
            packed = own["_packed_weights"] = PackedWeights()
        return packed

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as in torch.nn.

        Between training and evaluation weights are edited in ways that torch does not count, such
        as ``p.data.mul_(0.9)``, so that modules compare their contents after it.
        """
        if mode != self.training:
            recheck_weights()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch.nn; the packed weights are freed before a parameter moves."""
        release(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no packed weights."""
        return {k: v for k, v in self.__dict__.items() if k != "_packed_weights"}

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` asks for before it compiles a module."""
        raise TypeError(
            f"torch.jit.script cannot compile seqkernels' {type(self).__name__}: call restore() on "
            "the report of swap first, or use torch.jit.trace or torch.export"
        )


def release(module: nn.Module) -> None:
    """Free what a module owns of packed weights."""
    packed: PackedWeights | None = module.__dict__.pop("_packed_weights", None)
    if packed is not None:
        packed.clear()  # a snapshot refers to its owner


def shallow_clone(module: _M) -> _M:
    """Copy a module and its submodules; parameters, buffers and everything else are shared."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__ = {
        key: value.copy() if isinstance(value, dict | set) else value
        for key, value in module.__dict__.items()
        if key != "_packed_weights"
    }
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name] = shallow_clone(child)
    return clone


def as_fx_leaf(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """The node of a call, where ``torch.fx.symbolic_trace`` passes a proxy: a leaf, as torch.nn's.

    ``None`` for every other call.
    """
    first = arguments[0]
    if not isinstance(first, fx.Proxy):
        return None
    tracer: Any = first.tracer
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, arguments, keywords)
