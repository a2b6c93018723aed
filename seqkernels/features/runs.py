"""Where the events lie: flat columns in which each user's events are one run, sorted by time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from seqkernels.features.ragged import (
    Array,
    Rows,
    earlier_copies,
    expand,
    first_not_before,
    stable_order,
)

_GROWTH = 1.5


class Runs:
    """Runs of events in columns that share their rows.

    A slot stands for a user and owns the rows ``begin <= row < limit``; its events are
    ``first <= row < last``, sorted by time, where times are equal by arrival. Rows at ``last`` and
    after are free; rows before ``first`` held events that are no longer kept. Row 0 belongs to
    nobody: it holds the padding. Slot 0 is the unknown user, without rows.

    Parameters
    ----------
    padding : mapping of str to array
        For each column what row 0 holds, [] or [width]; it sets the column's dtype and width.
    time : str
        The column that sorts.
    identity : sequence of str
        Events of one user and time that agree in these columns are copies; the last arrived stays.
    keep_latest : int or None
        How many events of a user are kept.
    """

    def __init__(
        self,
        padding: Mapping[str, Array],
        time: str,
        identity: Sequence[str],
        keep_latest: int | None,
    ) -> None:
        self.columns = {name: value[None].copy() for name, value in padding.items()}
        self.bounds = np.zeros((1, 4), dtype=np.int64)  # [slots, (begin, first, last, limit)]
        self.used = 1  # rows
        self._time = time
        self._identity = tuple(identity)
        self._keep_latest = keep_latest

    def copy(self) -> Runs:
        """A copy of the same events, without room for more."""
        twin = object.__new__(Runs)
        twin.__dict__ |= self.__dict__
        twin.bounds = self.bounds.copy()
        twin.columns = {name: column[: self.used].copy() for name, column in self.columns.items()}
        return twin

    @property
    def time(self) -> Array:
        """The column that sorts."""
        return self.columns[self._time]

    def __len__(self) -> int:
        """Events of all slots."""
        return int((self.bounds[:, 2] - self.bounds[:, 1]).sum())

    def insert(self, slots: Rows, sizes: Rows, order: Rows, events: Mapping[str, Array]) -> None:
        """Take in events, each at its place.

        Only events not earlier than the earliest new one of their user are looked at again.

        Parameters
        ----------
        slots, sizes : int64 arrays [G]
            Different users, and how many of the new events are each one's.
        order : int64 array [N]
            Rows of `events` by user (as in `slots`), then time, then arrival.
        events : mapping of str to array [N] or [N, width]
            The columns.
        """
        self._reserve(slots, sizes)
        begin, first, last, limit = self.bounds[slots].T
        time = events[self._time][order]
        groups = np.arange(len(slots))
        group = np.repeat(groups, sizes)
        tail = first_not_before(self.time, first, last, time[np.cumsum(sizes) - sizes])
        behind = last - tail
        if behind.any():
            rows = expand(tail, behind)
            events = {n: np.concatenate((self.columns[n][rows], events[n])) for n in events}
            order = np.concatenate((np.arange(len(rows)), order + len(rows)))
            group = np.concatenate((np.repeat(groups, behind), group))
            time = events[self._time][order]
            again = stable_order(time, group)
            order, group, time = order[again], group[again], time[again]
        copies = self._copies(group, time, order, events)
        if len(copies):
            order, group = np.delete(order, copies), np.delete(group, copies)

        counts = np.bincount(group, minlength=len(slots))  # [G] events behind the head
        head = tail - first  # [G] events that stay as they are
        if self._keep_latest is not None:
            excess = np.maximum(head + counts - self._keep_latest, 0)
            from_head = np.minimum(excess, head)
            first, head, excess = first + from_head, head - from_head, excess - from_head
            if excess.any():
                rank = np.arange(len(group)) - (np.cumsum(counts) - counts)[group]
                order = order[rank >= excess[group]]
                counts -= excess

        total = head + counts
        full = np.flatnonzero(first + total > limit)
        if len(full):
            kept = expand(first[full], head[full])
            heads = {name: column[kept] for name, column in self.columns.items()}
            # Rows freed at the front serve again once they are half of the region; else it doubles.
            move = full[2 * total[full] > (limit - begin)[full]]
            size = np.where(limit[move] > begin[move], 2, 1) * total[move]
            begin[move] = self.used + np.cumsum(size) - size
            limit[move] = begin[move] + size
            self.used += int(size.sum())
            first[full] = begin[full]
            self._write(expand(first[full], head[full]), heads)
        self._write(expand(first + head, counts), {n: events[n][order] for n in self.columns})
        self.bounds[slots] = np.stack((begin, first, first + total, limit), axis=1)

    def _copies(self, group: Rows, time: Array, order: Rows, events: Mapping[str, Array]) -> Rows:
        """Positions in `order` of events of which a copy arrived later."""
        same = (group[1:] == group[:-1]) & (time[1:] == time[:-1])
        if not same.any():
            return np.empty(0, dtype=np.int64)
        tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
        moment = np.insert(np.cumsum(~same), 0, 0)[tied]
        keys = [events[name][order[tied]] for name in self._identity]
        return tied[earlier_copies([*keys, moment])]

    def _write(self, rows: Rows, values: Mapping[str, Array]) -> None:
        for name, column in self.columns.items():
            column[rows] = values[name]

    def _reserve(self, slots: Rows, sizes: Rows) -> None:
        """Make room for the slots and for the rows that one insertion can take."""
        short = int(slots.max()) + 1 - len(self.bounds)
        if short > 0:
            spare = np.zeros((short + len(self.bounds), 4), dtype=np.int64)
            self.bounds = np.concatenate((self.bounds, spare))
        begin, first, last, limit = self.bounds[slots].T
        need = int(np.where(limit > begin, 2 * (last - first + sizes), sizes).sum())
        if self.used + need > len(self.time):
            self._grow(need)

    def _grow(self, need: int) -> None:
        """Lay all runs out anew, without what was left behind, and with room for `need` rows."""
        begin, first, last, limit = self.bounds.T
        counts, size = last - first, limit - begin
        start = 1 + np.cumsum(size) - size
        used = 1 + int(size.sum())
        rows, places = expand(first, counts), expand(start, counts)
        columns = {}
        for name, column in self.columns.items():
            # zeros, not empty: pages that are never touched cost no memory, and none is undefined
            grown = np.zeros((int(_GROWTH * (used + need)), *column.shape[1:]), column.dtype)
            grown[0] = column[0]
            grown[places] = column[rows]
            columns[name] = grown
        self.columns, self.used = columns, used
        self.bounds = np.stack((start, start, start + counts, start + size), axis=1)
