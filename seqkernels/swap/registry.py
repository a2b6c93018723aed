"""The kinds of modules that this package knows."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from seqkernels.swap.batch_norms import BatchNorms
from seqkernels.swap.choice import reasons_against
from seqkernels.swap.encoders import Encoders
from seqkernels.swap.kind import Kind
from seqkernels.swap.linears import Linears
from seqkernels.swap.sequences import Sequences

#: A module is of the first kind that recognizes it. Batch norms are last: they recognize whatever
#: has running statistics.
KINDS: list[Kind] = [Encoders(), Sequences(), Linears(), BatchNorms()]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, None if this package knows none."""
    return next((kind for kind in KINDS if kind.recognizes(module)), None)


def swap_reasons(module: nn.Module, backend: str = "auto") -> list[str]:
    """Every reason why `swap` cannot replace this module; empty if it can."""
    kind = kind_of(module)
    if kind is None:
        return ["it is of no kind that seqkernels knows"]
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return ["it is lazy and knows no sizes yet; run the model once before the swap"]
    if type(module) not in kind.replaces:
        return [kind.other_class(module)]
    reasons = []
    if "forward" in module.__dict__:
        reasons.append("its forward was replaced on the instance")
    reasons += kind.reasons(module)
    if reasons or not kind.op:
        return reasons
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if not all(t.numel() for t in tensors):
        return ["it is empty: one of its sizes is 0"]
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        told = ", ".join(sorted(map(str, dtypes)))
        reasons.append(f"its parameters have different dtypes: {told}")
    problem = kind.problem(module, tensors[0].device.type, tensors[0].dtype)
    return reasons + reasons_against(problem, backend)
