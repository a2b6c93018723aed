"""What is measured: an encoder problem, the threads and the instruction set it gets, its rivals."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqkernels.testing import EncoderCase

#: All peers that a workload is measured against unless it names fewer.
PEERS = ("eager_fp32", "eager_bf16", "eager_bf16_padded", "compile_bf16", "openvino_bf16")


def uniform_lengths(batch: int, low: int, high: int, seed: int = 0) -> tuple[int, ...]:
    """Numbers of valid events of `batch` users, uniform in low .. high.

    Examples
    --------
    >>> from seqkernels.benchmark import uniform_lengths
    >>> len(uniform_lengths(256, 20, 100))
    256
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(low, high + 1, (batch,), generator=generator).tolist())


@dataclass(frozen=True)
class Workload:
    """One comparison: every contestant computes the same problem in one interleaved run.

    Attributes
    ----------
    id, group : str
        Its name, and the part of the report it belongs to.
    case : EncoderCase
        The problem, full-sequence output. Its values are exact in bf16, so that no contestant has
        an error from rounding what it is given.
    contestants : tuple of str
        Names from ``CONTESTANTS``; "seqkernels" is among them.
    threads : int
        Threads of every contestant; 0: torch's default, which is the number of cores.
    isa : str or None
        Instruction set forced upon seqkernels; None: the best.
    seconds : float
        Time for the interleaved rounds, preparation aside; it decides how many rounds there are.
    dynamic : bool
        Whether torch.compile compiles once for all shapes of a sweep, instead of for this shape.
    """

    id: str
    group: str
    case: EncoderCase
    contestants: tuple[str, ...] = ("seqkernels", *PEERS)
    threads: int = 0
    isa: str | None = None
    seconds: float = 8.0
    dynamic: bool = False

    @property
    def masked(self) -> bool:
        """Whether there is a padding mask."""
        return self.case.mask != "none"

    @property
    def num_threads(self) -> int:
        """Threads of every contestant."""
        return self.threads or torch.get_num_threads()

    def valid_lengths(self) -> tuple[int, ...]:
        """Number of valid events of each sequence."""
        case = self.case
        if not self.masked:
            return (case.length,) * case.batch
        if case.valid is None:
            raise ValueError(f"{self.id}: case: expected lengths in `valid`, got none")
        return case.valid

    def multiply_adds(self) -> int:
        """Multiply-accumulates the result needs: products with weights, scores, weighted sums.

        Only valid events are keys, and only they are queries unless padded ones are to be computed.
        """
        case = self.case
        d, f = case.d_model, case.dim_feedforward
        total = 0
        for keys in self.valid_lengths():
            queries = case.length if case.padding == "compute" else keys
            total += 2 * (queries + keys) * d * d + 2 * queries * (keys * d + d * f)
        return total * case.num_layers

    def describe(self) -> dict[str, object]:
        """Its sizes, for a results file."""
        case = self.case
        return {
            "id": self.id,
            "group": self.group,
            "batch": case.batch,
            "length": case.length,
            "d_model": case.d_model,
            "nhead": case.nhead,
            "dim_feedforward": case.dim_feedforward,
            "num_layers": case.num_layers,
            "masked": self.masked,
            "padded_output": case.padding,
            "valid_events": sum(self.valid_lengths()),
            "multiply_adds": self.multiply_adds(),
            "threads": self.num_threads,
            "isa": self.isa,
            "dynamic": self.dynamic,
        }
