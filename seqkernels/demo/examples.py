"""Ratings become examples: a user's history at a moment, a candidate item, and the answer.

Everything an example knows happened strictly before it. Ratings with the same timestamp (a user
rates a page of films at once) do not see each other: which of them came first is not known, and one
would tell of the others.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqkernels.demo.data import LIKED, LOVED, DataError, Ratings

LENGTH = 100  # events of a history
FEATURES = ("ratings so far", "rate of likes", "pause", "new client")
#: Told by the client with each request: whether it is a new version. The ratings know of no such
#: thing, so it is 0 for all of them, as such a feature is before the version ships.
MOVING = FEATURES.index("new client")
_PRIOR_WEIGHT = 5.0  # ratings of an average user that everyone's rate of likes starts from
_MIN_RATINGS = 3  # of an item in the training set, to have an embedding of its own
_TRAIN, _VALIDATION = 0.8, 0.1  # the rest is the test set


class Batch(NamedTuple):
    """What the model reads. B users or one, N candidates; 0 is the empty event or item."""

    actions: Tensor  # [B, L] int64, latest first; the rating as an action 1, 2, ...
    items: Tensor  # [B, L] int64
    lengths: Tensor  # [B] int64, number of events
    features: Tensor  # [B, 4] float32, see FEATURES
    candidate: Tensor  # [N] int64, N = B or B = 1

    def for_candidates(self, candidate: Tensor) -> Batch:
        """One user's batch with other candidates [N]."""
        return self._replace(candidate=candidate)

    def from_new_clients(self) -> Batch:
        """The same requests, sent by the new version of the client."""
        features = self.features.clone()
        features[:, MOVING] = 1.0
        return self._replace(features=features)


@dataclass(frozen=True)
class Split:
    """Rows of the examples by time; everything in a set is later than all in the one before.

    Attributes
    ----------
    train, validation, test : int64 arrays
        Rows in order of time.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def prepare(ratings: Ratings) -> tuple[Examples, Split]:
    """Make the examples and split them.

    What they know of the whole (which items are known, how many likes there are) is learned from
    the training set: an item has to be rated `_MIN_RATINGS` times in it.

    Raises
    ------
    DataError
        If there are too few ratings, or a set has only likes or none.
    """
    rows = split_by_time(ratings.time).train
    times_rated = np.bincount(ratings.item[rows], minlength=ratings.num_items)
    known = np.flatnonzero(times_rated >= _MIN_RATINGS)
    examples = Examples(ratings, known, float(ratings.liked[rows].mean()))
    split = split_by_time(examples.time)
    for part in dataclasses.fields(split):
        if len(np.unique(examples.liked[getattr(split, part.name)])) < 2:
            raise DataError(
                f"the {part.name} set needs both likes (>= {LIKED:g}) and other ratings"
            )
    return examples, split


class Examples:
    """One example for each rating, sorted by user and time.

    A history is a run of rows that ends where those with the example's own timestamp begin, so
    two numbers an example describe it, and batches are gathered when they are needed.

    Parameters
    ----------
    ratings : Ratings
        All ratings.
    known_items : int64 array, optional
        Items with an embedding of their own; all others are told as one, "unknown". All by default.
    like_rate : float
        The rate of likes assumed for a user without ratings.

    Attributes
    ----------
    time, liked, loved : arrays [N]
        Of each example.
    begin, end : int64 arrays [N]
        Its history is the rows ``begin <= row < end``.
    """

    def __init__(
        self,
        ratings: Ratings,
        known_items: NDArray[np.int64] | None = None,
        like_rate: float = 0.5,
    ) -> None:
        count = len(ratings)
        # Stable: where user and time are equal, the file's order stays.
        order = np.lexsort((ratings.time, ratings.user))
        user = ratings.user[order]
        self.time = ratings.time[order]
        self.liked = ratings.liked[order]
        self.loved = ratings.rating[order] >= LOVED
        new_user = np.concatenate(([True], user[1:] != user[:-1]))
        new_moment = new_user | np.concatenate(([True], self.time[1:] != self.time[:-1]))
        first = _start_of_run(new_user)
        self.end = _start_of_run(new_moment)
        self.begin = np.maximum(first, self.end - LENGTH)

        if known_items is None:
            known_items = np.arange(ratings.num_items)
        number = np.ones(ratings.num_items, dtype=np.int64)  # 0 empty, 1 unknown, 2 ... known
        number[known_items] = 2 + np.arange(len(known_items))
        self.num_items = 2 + len(known_items)
        values, action = np.unique(ratings.rating, return_inverse=True)
        self.num_actions = 1 + len(values)
        # A row more, the empty event: the gather of a batch reads it where there is no event.
        self._actions = torch.from_numpy(np.append(1 + action[order], 0))
        self._items = torch.from_numpy(np.append(number[ratings.item[order]], 0))
        self._empty = count

        likes = np.concatenate(([0], np.cumsum(self.liked)))
        seen = self.end - first
        liked = likes[self.end] - likes[first]
        rate = (liked + _PRIOR_WEIGHT * like_rate) / (seen + _PRIOR_WEIGHT)
        # Time since the latest event; a user without one gets 0, as log1p(count) 0 tells already.
        pause = np.where(seen > 0, self.time - self.time[np.maximum(self.end - 1, 0)], 0.0)
        constant = np.zeros(count)
        features = np.stack(
            [np.log1p(seen), 4.0 * rate - 2.0, 0.1 * np.log1p(pause), constant], axis=1
        )
        self._features = torch.from_numpy(features.astype(np.float32))

    def __len__(self) -> int:
        return self._empty

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of events of each history, [N]."""
        return self.end - self.begin

    def batch(self, rows: NDArray[np.int64], length: int = LENGTH) -> Batch:
        """Gather examples.

        Parameters
        ----------
        rows : int64 array [B]
            Which.
        length : int
            Positions L of the histories, padded on the right; at most `LENGTH`, and at least the
            longest one.
        """
        at = self.end[rows, None] - 1 - np.arange(length)  # latest first
        source = torch.from_numpy(np.where(at >= self.begin[rows, None], at, self._empty))
        index = torch.from_numpy(rows)
        return Batch(
            self._actions[source],
            self._items[source],
            torch.from_numpy(self.lengths[rows]),
            self._features[index],
            self._items[index],
        )


def _start_of_run(starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each row the row at which its run starts."""
    return np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))


def split_by_time(time: NDArray[np.float64]) -> Split:
    """Split rows in time order 80 : 10 : 10; equal times stay on one side.

    Parameters
    ----------
    time : float64 array [N]
        Of each row.

    Raises
    ------
    DataError
        If a part would be empty.

    Examples
    --------
    >>> split = split_by_time(np.array([5.0, 3.0, 0.0, 2.0, 4.0, 6.0, 1.0, 8.0, 9.0, 7.0]))
    >>> split.train.tolist(), split.validation.tolist(), split.test.tolist()
    ([2, 6, 3, 1, 4, 0, 5, 9], [7], [8])
    """
    order = np.argsort(time, kind="stable")
    ordered = time[order]
    cuts = [
        int(np.searchsorted(ordered, ordered[int(share * len(time))], side="left"))
        for share in (_TRAIN, _TRAIN + _VALIDATION)
    ]
    split = Split(order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])
    if not all(len(part) for part in (split.train, split.validation, split.test)):
        raise DataError("the ratings are too few, or too many have one timestamp, to split by time")
    return split
