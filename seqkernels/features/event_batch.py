"""What a model reads: padded columns and how many events of each row are real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqkernels.features.ragged import Array


class EventTensors(NamedTuple):
    """An `EventBatch` as modules take it; unpacks into ``columns, lengths``.

    Attributes
    ----------
    columns : dict of str to Tensor
        [B, L], or [B, L, width].
    lengths : int64 Tensor [B]
    """

    columns: dict[str, Tensor]
    lengths: Tensor

    @property
    def key_padding_mask(self) -> Tensor:
        """[B, L] bool, True: ignore; for modules that take a mask and no lengths.

        Examples
        --------
        >>> batch = EventBatch({"item": np.array([[5, 4, 0]])}, np.array([2]))
        >>> batch.tensors().key_padding_mask
        tensor([[False, False,  True]])
        """
        length = next(iter(self.columns.values())).shape[1]
        return torch.arange(length, device=self.lengths.device) >= self.lengths[:, None]


@dataclass(frozen=True)
class EventBatch:
    """Events of B users, padded to L, as NumPy arrays. Modules take tensors: see `tensors`.

    Attributes
    ----------
    columns : dict of str to array
        [B, L], or [B, L, width]; the first ``lengths[b]`` events of row b are real, the rest is
        padding. Times are among them.
    lengths : int64 array [B]
        0 for an unknown user or an empty history.

    Examples
    --------
    >>> batch = EventBatch({"item": np.array([[5, 4, 0]])}, np.array([2]))
    >>> batch["item"].tolist(), batch.key_padding_mask.tolist()
    ([[5, 4, 0]], [[False, False, True]])

    Into a module of PyTorch:

    >>> inputs = batch.tensors()
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    >>> events = torch.nn.Embedding(10, 8)(inputs.columns["item"])
    >>> layer(events, src_key_padding_mask=inputs.key_padding_mask).shape
    torch.Size([1, 3, 8])
    """

    columns: dict[str, Array]
    lengths: NDArray[np.int64]

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    @property
    def key_padding_mask(self) -> NDArray[np.bool_]:
        """[B, L], True: ignore. The tensor that modules take is ``tensors().key_padding_mask``."""
        length = next(iter(self.columns.values())).shape[1]
        return np.arange(length) >= self.lengths[:, None]

    def tensors(self) -> EventTensors:
        """The columns and the lengths as tensors that share the arrays' memory.

        Datetimes become int64, nanoseconds from 1970.

        Examples
        --------
        >>> batch = EventBatch({"item": np.array([[5, 4, 0]])}, np.array([2]))
        >>> columns, lengths = batch.tensors()
        >>> columns["item"], lengths
        (tensor([[5, 4, 0]]), tensor([2]))
        """
        columns = {
            name: torch.from_numpy(array.view(np.int64) if array.dtype.kind == "M" else array)
            for name, array in self.columns.items()
        }
        return EventTensors(columns, torch.from_numpy(self.lengths))
