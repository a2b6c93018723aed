"""Which backend a problem gets, and why no other does."""

from __future__ import annotations

from seqkernels import backends, settings
from seqkernels.backends import cpu
from seqkernels.errors import BackendUnavailableError

Why = list[tuple[str, tuple[str, ...]]]  # (other code, reasons) for each that does not run


def asked(name: str) -> str:
    """The backend that counts where a module names this one."""
    return settings.current.backend if name == "auto" else name


def reasons_against(problem: backends.Problem, name: str) -> list[str]:
    """Why no backend but the reference runs it; for a named one that cannot, its error."""
    try:
        choice = backends.resolve(problem, name)
    except BackendUnavailableError as error:
        named = next(b for b in backends.BACKENDS if b.name == asked(name))
        # A named backend without this kernel leaves the module alone; one that can run none is an
        # error.
        any_kernel = named.reasons(problem._replace(op="resilient_batch_norm", size=None))
        if any_kernel:
            raise backends.unavailable("swap", named.name, any_kernel) from None
        return [f"{named.name}: {reason}" for reason in error.reasons]
    if choice.backend.name != "reference":
        return []
    return [f"{n}: {reason}" for n, reasons in choice.rejected for reason in reasons]


def what_runs(problem: backends.Problem, name: str) -> tuple[str, Why]:
    """The backend that runs, and every condition that each other one does not meet."""
    try:
        choice = backends.resolve(problem, name)
    except BackendUnavailableError as error:
        return f"an error: backend {asked(name)!r} cannot run", [(asked(name), error.reasons)]
    others: Why = []
    for backend in backends.BACKENDS:
        if backend is choice.backend:
            if backend.name == "cpu":
                others += [(f"cpu/{s.name}", s.reasons) for s in cpu.isa_table() if not s.chosen]
            continue
        reasons = [] if asked(name) == "auto" else [f"backend {asked(name)!r} was asked for"]
        reasons += backend.reasons(problem)
        others.append((backend.name, tuple(reasons or ["a faster backend runs"])))
    return choice.label, others
