"""Events of many users, kept in order, read back as padded sequences as of a moment."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqkernels.features import columns as read
from seqkernels.features import times as clock
from seqkernels.features.event_batch import EventBatch
from seqkernels.features.fork import give_lock
from seqkernels.features.ragged import Array, Rows, stable_order
from seqkernels.features.runs import Runs

_ORDERS = ("latest_first", "latest_last")


class _Events(NamedTuple):
    """A source, read and checked."""

    ids: Array  # [N] int64 or uint64
    labels: list[str] | None  # what the ids stand for where users are strings
    times: str  # what times are, see `times.read_times`
    columns: dict[str, Array]  # the time column first; [N] or [N, width]


class EventSequences:
    """What each user did, from several sources, as a model's padded input as of any moment.

    An event is a row: a user, a time and further columns (action, item, ...). Sources, such as a
    historical batch and a real-time stream, may overlap and come in any order; later events are
    taken in by `append`. For a user and a request time `at`, `batch` returns the latest events with

        time < at - exclude_within

    so that neither a label nor anything within the window before it can leak into its own input.

    Parameters
    ----------
    *sources : mapping of str to column, DataFrame, or Arrow table
        At least one, possibly without rows; the first one sets the dtypes. DataFrames are those of
        pandas and polars. Arrow tables are pyarrow's and whatever offers Arrow's C interface
        (``__arrow_c_stream__``), for which pyarrow must be installed, as for polars. A column is
        anything that NumPy can read, or a column of one of these libraries. The same as `append`,
        one by one.
    user, time : str
        Names of the two columns. User ids are integers, not necessarily dense, or strings. Times
        are integers (kept as int64), floats of 64 bits, or datetimes, naive or aware (kept as
        nanoseconds from 1970; aware ones in UTC); one of the four in all sources and requests.
    columns : sequence of str, optional
        Further columns to keep; by default all that the first source has. Booleans, integers and
        floats, [N] or [N, width]. What else a source has is not read.
    length : int
        L, the most events of a user in a batch, unless `batch` is told otherwise.
    keep_latest : int, optional
        How many events of a user are kept; all by default. The oldest go first, for good, after
        each source and each `append`; an event that arrives late and is older than those kept goes
        at once. Serving needs only the latest; a batch as of the past needs those that were the
        latest then.
    deduplicate_by : sequence of str, optional
        Events with equal user and time that agree in these columns too are one event: the copy
        that arrived last stays, at its place. By default all columns [N]; NaN equals NaN.
    padding : mapping of str to number, optional
        What a column holds where there is no event; 0 by default. For datetimes also a datetime,
        or NaT.
    timezone : str or datetime.tzinfo, optional
        The zone of naive datetimes, such as ``"Europe/Berlin"``: they are local times there. With
        it all datetimes are kept in UTC, and naive and aware ones may be mixed; without it, that is
        an error. NumPy's datetime64 counts as naive, since it cannot say which it is; so does the
        one in a batch, which is UTC where times are aware: ``timezone="UTC"`` reads it back.

    Attributes
    ----------
    columns : tuple of str
        The columns of a batch, the time first.
    num_users : int
        Users that have an event. ``len()`` is the number of events.

    Raises
    ------
    ValueError, TypeError
        For a missing column or two of one name, columns of different lengths, nulls, values that do
        not fit the dtype that the first source set, and options out of range; for times that are
        not finite, datetimes that 64 bits of nanoseconds cannot hold (they reach from 1677-09-21
        to 2262-04-11), naive and aware datetimes together, local times that clocks show twice or
        never, and floats of fewer than 64 bits as times: they lose the order of events (float32
        rounds seconds since 1970 to multiples of 128), and converting them back does not restore
        it.
    ImportError
        For an object with Arrow's C interface where pyarrow is not installed.

    Notes
    -----
    ==================  ============================================================================
    out-of-order event  takes its place by time; events of equal time stay in order of arrival
    duplicate           replaces the earlier copy, see `deduplicate_by`
    future event        kept, and seen by requests after it; with ``at=None`` there is no request
                        time, so it is seen at once. Under `keep_latest` it counts as a latest one
    unknown user        length 0, all padding
    empty history       the same
    ==================  ============================================================================

    A null or NaN in a floating column is an event with NaN; in any other column, and in a list, a
    null is an error that names its row. (pandas itself makes floats of integers beside ``None``.)

    An append costs what it brings, not what is held, but for the few in which the columns grow by
    half: those copy everything.

    Methods may be called from several threads: they take turns. A fork takes its turn too: it waits
    for the appends under way, and the child's stores are whole and not in use. Copies and pickles
    hold the events. After an append that was interrupted (Ctrl-C) every call raises RuntimeError.

    Examples
    --------
    >>> import numpy as np, torch, seqkernels
    >>> historical = {
    ...     "user": np.array([7, 7, 9]), "time": np.array([10, 20, 15]),
    ...     "action": np.array([1, 2, 1]), "item": np.array([100, 101, 100]),
    ... }
    >>> real_time = {"user": [7, 7], "time": [20, 30], "action": [2, 1], "item": [101, 102]}
    >>> events = seqkernels.features.EventSequences(historical, real_time, length=4)
    >>> len(events), events.num_users  # the event at 20 is in both
    (4, 2)
    >>> batch = events.batch([7, 9, 8], at=30)  # nothing at 30 or later is seen
    >>> batch["item"].tolist(), batch.lengths.tolist()
    ([[101, 100, 0, 0], [100, 0, 0, 0], [0, 0, 0, 0]], [2, 1, 0])

    An event at 12:00 in Berlin is before a request at 10:30 in UTC:

    >>> from datetime import UTC, datetime
    >>> local = {"user": [7], "time": [datetime(2024, 6, 1, 12)], "item": [5]}
    >>> in_berlin = seqkernels.features.EventSequences(local, timezone="Europe/Berlin")
    >>> in_berlin.batch([7], at=datetime(2024, 6, 1, 10, 30, tzinfo=UTC)).lengths.tolist()
    [1]

    The sequences as the encoder's input:

    >>> columns, lengths = batch.tensors()
    >>> embed = torch.nn.Embedding(200, 32)
    >>> encoder = seqkernels.nn.UserSequenceEncoder(32, 32, 2, 32, 2, latest_k=2).eval()
    >>> with torch.inference_mode():
    ...     out = encoder(embed(columns["item"]), torch.randn(3, 32), lengths=lengths)
    >>> out.shape
    torch.Size([3, 192])
    """

    _lock: threading.RLock

    def __init__(
        self,
        *sources: Any,
        user: str = "user",
        time: str = "time",
        columns: Sequence[str] | None = None,
        length: int = 100,
        keep_latest: int | None = None,
        deduplicate_by: Sequence[str] | None = None,
        padding: Mapping[str, Any] | None = None,
        timezone: str | datetime.tzinfo | None = None,
    ) -> None:
        if not sources:
            raise TypeError(_message("sources", "at least one", "none"))
        if user == time:
            raise ValueError(_message("time", "another column than user", repr(time)))
        self._user, self._time = user, time
        source = read.frame(sources[0], _where("sources"))
        if columns is None:
            columns = [name for name in read.names(source) if name not in (user, time)]
        self.columns = (time, *_names(columns, "columns"))
        for name in (user, time):
            if name in self.columns[1:]:
                raise ValueError(_message("columns", "further columns alone", repr(name)))
        if not isinstance(padding or {}, Mapping):
            raise TypeError(_message("padding", "a mapping of names to numbers", repr(padding)))
        self._length = _count(length, "length")
        if keep_latest is not None:
            keep_latest = _count(keep_latest, "keep_latest")

        self._zone = clock.read_zone(timezone, _where("timezone"))
        give_lock(self)
        self._changing = False  # true for good if an insertion does not come to its end
        self._slots: dict[int | str, int] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}  # empty until the first source is read
        first = self._read(source)
        self._strings = first.labels is not None
        self._id_dtype = first.ids.dtype
        self._times = first.times
        if self._zone is not None and self._times not in clock.DATETIMES:
            raise ValueError(_message("timezone", f"none, as times are {self._times}", self._zone))
        self._dtypes = {name: array.dtype for name, array in first.columns.items()}
        flat = [n for n, array in first.columns.items() if array.ndim == 1 and n != time]
        self._runs = Runs(
            self._padding(padding or {}, first.columns),
            time,
            _chosen(flat if deduplicate_by is None else deduplicate_by, flat, "deduplicate_by"),
            keep_latest,
        )
        self._insert(first)
        for further in sources[1:]:
            self.append(further)

    def append(self, events: Any) -> None:
        """Take in further events, in any order; all of them or, with an error in them, none.

        Parameters
        ----------
        events : mapping of str to column, DataFrame, or Arrow table
            With the columns of the first source, of values that fit its dtypes.

        Examples
        --------
        >>> events = EventSequences({"user": ["a"], "time": [5], "item": [1]}, length=3)
        >>> events.append({"user": ["a", "b"], "time": [4, 6], "item": [2, 3]})
        >>> events.batch(["a", "b"])["item"].tolist()
        [[1, 2, 0], [3, 0, 0]]
        """
        new = self._read(events)
        with self._lock:
            self._check_whole()
            self._insert(new)

    def batch(
        self,
        users: Any,
        at: Any = None,
        *,
        length: int | None = None,
        exclude_within: Any = 0,
        order: str = "latest_first",
    ) -> EventBatch:
        """Each user's latest events before a moment.

        Parameters
        ----------
        users : column
            [B] ids, as in the events; a user may appear more than once.
        at : time or column, optional
            The request time, or one for each user [B], of the kind that the events' times are.
            Only events strictly before it are seen. ``None``: every event is.
        length : int, optional
            L; by default that of the constructor.
        exclude_within : time span
            Events later than this before `at`, or exactly at that distance, are not seen either:
            what is seen has ``time < at - exclude_within``. In the unit of times; a timedelta
            where they are datetimes. With floats, an event at the distance up to rounding counts as
            at the distance: 10.2 is not seen from 10.3 with 0.1.
        order : str
            ``"latest_first"`` or ``"latest_last"``. In both the events come first in a row
            and the padding after them.

        Returns
        -------
        EventBatch
            Columns [B, L] or [B, L, width] in the events' dtypes, times included (datetime64[ns]
            where they are datetimes, in UTC where they are aware), and ``lengths`` [B] int64. New
            arrays, not views. ``batch(...).tensors()`` is what modules take.

        Examples
        --------
        >>> events = EventSequences({"user": [1, 1, 1], "time": [10, 20, 30], "item": [5, 6, 7]})
        >>> batch = events.batch([1, 1], at=[30, 31], length=2, exclude_within=10)
        >>> batch["item"].tolist(), batch.lengths.tolist()
        ([[5, 0], [6, 5]], [1, 2])
        """
        length = self._length if length is None else _count(length, "length")
        if order not in _ORDERS:
            raise ValueError(_message("order", " or ".join(map(repr, _ORDERS)), repr(order)))
        keys, which = self._read_users(users)
        span = clock.read_span(exclude_within, self._times, _where("exclude_within"))
        moments = self._moments(at, len(which))
        if moments is None and span:
            raise ValueError(_message("exclude_within", "0 without `at`", repr(exclude_within)))
        with self._lock:
            self._check_whole()
            get = self._slots.get
            slots = np.array([get(key, 0) for key in keys], dtype=np.int64)[which]  # [B]
            _, first, last, _ = self._runs.bounds[slots].T
            if moments is not None:
                last = clock.rows_before(self._runs.time, first, last, moments, span)
            lengths = np.minimum(last - first, length)
            steps = np.arange(length)
            if order == "latest_first":
                rows = (last - 1)[:, None] - steps
            else:
                rows = (last - lengths)[:, None] + steps
            rows *= steps < lengths[:, None]  # [B, L]; row 0 is the padding
            columns = {name: c.take(rows, axis=0) for name, c in self._runs.columns.items()}
        if self._times in clock.DATETIMES:
            columns[self._time] = columns[self._time].view("M8[ns]")
        return EventBatch(columns, lengths)

    @property
    def num_users(self) -> int:
        """Users that have an event."""
        return len(self._slots)

    def __len__(self) -> int:
        with self._lock:
            self._check_whole()
            return len(self._runs)

    def __repr__(self) -> str:
        return f"EventSequences({len(self)} events, {self.num_users} users, {self.columns})"

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._check_whole()
            state = {**self.__dict__, "_slots": dict(self._slots)}
            state["_runs"] = self._runs.copy()
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        give_lock(self)

    def _check_whole(self) -> None:
        if self._changing:
            raise RuntimeError(
                "EventSequences: an append was interrupted while it changed the columns; "
                "build the events anew"
            )

    def _insert(self, new: _Events) -> None:
        if not len(new.ids):
            return
        order = stable_order(new.columns[self._time], new.ids)
        ids = new.ids[order]
        starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
        sizes = np.diff(starts, append=len(ids))
        keys: list[Any] = ids[starts].tolist()
        if new.labels is not None:
            keys = [new.labels[key] for key in keys]
        known = self._slots
        unknown = [key for key in keys if key not in known]
        fresh = {key: slot for slot, key in enumerate(unknown, len(known) + 1)}
        slots = np.array([known.get(key) or fresh[key] for key in keys])
        self._changing = True
        self._runs.insert(slots, sizes, order, new.columns)
        known.update(fresh)
        self._changing = False

    def _read(self, events: Any) -> _Events:
        """Check a source against the first one."""
        events = read.frame(events, _where("events"))
        present = read.names(events)
        names = (self._user, *self.columns)
        for name in names:
            if name not in present:
                raise ValueError(_message(name, "a column of this name", f"only {present}"))
            if (count := present.count(name)) > 1:
                raise ValueError(_message(name, "one column of this name", count))
        if self._dtypes and all(read.is_empty(read.column(events, name)) for name in names):
            return _Events(np.empty(0, dtype=np.int64), None, self._times, {})
        ids, labels = read.read_ids(read.column(events, self._user), _where(self._user))
        times, kind = self._read_times(read.column(events, self._time), self._time)
        columns = {self._time: times}
        for name in self.columns[1:]:
            columns[name] = read.read_numbers(read.column(events, name), _where(name))
        for name, array in columns.items():
            if len(array.shape) == 0 or len(array) != len(ids):
                raise ValueError(
                    _message(name, f"{len(ids)} rows, as in {self._user}", list(array.shape))
                )
        if times.ndim != 1:
            raise ValueError(_message(self._time, "shape [n]", list(times.shape)))
        if not self._dtypes:
            return _Events(ids, labels, kind, columns)

        self._check_kind(labels, self._user)
        if labels is None:
            ids = read.conform(ids, self._id_dtype, _where(self._user))
        for name in self.columns[1:]:
            shape = self._runs.columns[name].shape[1:]
            if columns[name].shape[1:] != shape:
                expected = f"shape {['n', *shape]}, as in the first source"
                raise ValueError(_message(name, expected, list(columns[name].shape)))
            columns[name] = read.conform(columns[name], self._dtypes[name], _where(name))
        return _Events(ids, labels, kind, columns)

    def _check_kind(self, labels: list[str] | None, name: str) -> None:
        if (labels is not None) != self._strings:
            kinds = ("strings", "integers") if self._strings else ("integers", "strings")
            raise TypeError(_message(name, f"{kinds[0]}, as in the first source", kinds[1]))

    def _read_times(self, values: Any, name: str) -> tuple[Array, str]:
        """Times, and of which kind: that of the first source, once there is one."""
        times, kind = clock.read_times(values, self._zone, _where(name))
        if not self._dtypes or kind == self._times:
            return times, kind
        if (kind, self._times) == (clock.INTEGERS, clock.NUMBERS):
            return read.conform(times, np.dtype(np.float64), _where(name)), self._times
        hint = ""
        if kind in clock.DATETIMES and self._times in clock.DATETIMES:
            hint = " (`timezone`, of the constructor, says where naive ones are local)"
        expected = f"{self._times}, as in the first source"
        raise TypeError(_message(name, expected, kind) + hint)

    def _read_users(self, users: Any) -> tuple[list[Any], Rows]:
        """Keys of the users asked for, and for each of the batch which key is its own."""
        if read.is_empty(users):
            return [], np.empty(0, dtype=np.int64)
        ids, labels = read.read_ids(users, _where("users"))
        if len(ids):
            self._check_kind(labels, "users")
        if labels is not None:
            return labels, ids
        return ids.tolist(), np.arange(len(ids))

    def _moments(self, at: Any, count: int) -> Array | None:
        """The request times [B]."""
        if at is None:
            return None
        if read.is_empty(at):  # then its type says nothing
            times = np.empty(0, dtype=self._dtypes[self._time])
        else:
            times, _ = self._read_times(at, "at")
        if times.ndim and times.shape != (count,):
            raise ValueError(_message("at", f"one time or {count}", f"shape {list(times.shape)}"))
        return np.broadcast_to(times, count)

    def _padding(self, given: Mapping[str, Any], first: Mapping[str, Array]) -> dict[str, Array]:
        """Row 0 of each column."""
        _chosen(given, self.columns, "padding")
        rows = {}
        for name, array in first.items():
            title = f"padding[{name!r}]"
            value = np.asarray(given.get(name, array.dtype.type(0)))
            if name == self._time and self._times in clock.DATETIMES and value.dtype.kind in "MO":
                if read.is_null(given[name]):  # NaT, where there is no time
                    value = np.array(np.datetime64("NaT", "ns")).view(np.int64)
                else:
                    value, _ = self._read_times(given[name], title)
            if value.ndim or value.dtype.kind not in "biuf":
                raise TypeError(_message(title, "a number", repr(given[name])))
            value = read.conform(value, array.dtype, _where(title))
            rows[name] = np.full(array.shape[1:], value, dtype=array.dtype)
        return rows


def _where(name: str) -> str:
    return f"EventSequences: {name}"


def _message(name: str, expected: str, got: Any) -> str:
    return f"{_where(name)}: expected {expected}, got {got}"


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(_message(name, "an integer", repr(value)))
    if value < 1:
        raise ValueError(_message(name, "at least 1", value))
    return int(value)


def _names(values: Any, name: str) -> list[str]:
    listed = isinstance(values, Iterable) and not isinstance(values, str)
    names = list(values) if listed else []
    if not listed or not all(isinstance(value, str) for value in names):
        raise TypeError(_message(name, "a sequence of names", repr(values)))
    if len(set(names)) < len(names):
        raise ValueError(_message(name, "each name once", repr(names)))
    return names


def _chosen(values: Any, allowed: Sequence[str], name: str) -> list[str]:
    chosen = _names(values, name)
    for value in chosen:
        if value not in allowed:
            raise ValueError(_message(name, f"some of {list(allowed)}", repr(value)))
    return chosen
