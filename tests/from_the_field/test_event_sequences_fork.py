"""Forks while threads use a store, and appends that are cut off."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import weakref

import pytest

from seqkernels.features import EventSequences
from seqkernels.features.runs import Runs

PRELUDE = """
import copy, os, pickle, signal, threading, time, traceback
from seqkernels.features import EventSequences
from seqkernels.features.runs import Runs

def store():
    return EventSequences({"user": [7, 7], "time": [10, 30], "item": [1, 3]}, length=4)

LATE = {"user": [7], "time": [20], "item": [2]}
WHOLE = [[3, 2, 1, 0]]

def fork(check):
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # ends a child that hangs
        try:
            check()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with {status}"
"""


def run(script: str) -> None:
    code = PRELUDE + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_fork_while_a_thread_uses_the_store() -> None:
    """The child inherited a lock that nobody would release, and half an append behind it."""
    run("""
    def case(events, use, held_in):
        inside, forking = threading.Event(), threading.Event()
        original = getattr(Runs, held_in)

        def held(self, *arguments):
            inside.set()
            forking.wait()
            time.sleep(0.3)  # a fork that does not wait is over by then
            return original(self, *arguments)

        setattr(Runs, held_in, held)
        thread = threading.Thread(target=use, args=[events])
        thread.start()
        inside.wait()
        os.register_at_fork(before=forking.set)  # the last one registered runs first

        def in_child():
            setattr(Runs, held_in, original)
            if use is append:  # it was under way: the fork waited for it
                assert events.batch([7])["item"].tolist() == WHOLE
            events.append({"user": [8, 7], "time": [1, 40], "item": [9, 4]})
            assert events.batch([8])["item"].tolist() == [[9, 0, 0, 0]]
            assert pickle.loads(pickle.dumps(events)).num_users == 2
            fork(lambda: events.append(LATE))  # a child of the child

        fork(in_child)
        thread.join()
        setattr(Runs, held_in, original)
        events.append(LATE)
        assert events.batch([7])["item"].tolist() == WHOLE

    def append(events):
        events.append(LATE)

    case(store(), append, "_write")
    case(copy.deepcopy(store()), append, "_write")
    case(pickle.loads(pickle.dumps(store())), append, "insert")
    case(store(), pickle.dumps, "copy")
    case(store(), len, "__len__")
    """)


def test_forks_among_many_stores_and_threads() -> None:
    run("""
    stores = [store() for _ in range(30)]
    stop = threading.Event()

    def work(first):
        count = 0
        while not stop.is_set():
            count += 1
            for events in stores[first::3]:
                events.append({"user": [7, 8], "time": [40 + count] * 2, "item": [count] * 2})
                copy.copy(events)
                store().append(LATE)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()

    def in_child():
        for events in stores + [store()]:
            batch = events.batch([7, 8], length=3)
            assert batch.lengths.tolist() in ([2, 0], [3, 1], [3, 2], [3, 3]), batch.lengths
            newest = batch["item"][:, 0].tolist()
            assert newest[0] == newest[1] or newest == [3, 0], newest
            events.append(LATE)

    for _ in range(10):
        fork(in_child)
    stop.set()
    for thread in threads:
        thread.join()
    """)


def test_a_fork_in_the_thread_that_holds_the_lock() -> None:
    """As in a signal handler that interrupts an append: it must not wait for itself."""
    run("""
    events, original = store(), Runs._write
    signal.alarm(60)

    def handler(self, *arguments):
        Runs._write = original
        fork(lambda: None)
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
        else:
            assert os.waitpid(pid, 0)[1] == 0
        try:
            events.batch([7])
            raise SystemExit("half an append was shown")
        except RuntimeError as error:
            assert "interrupted" in str(error)
        original(self, *arguments)
        events.forked = pid

    Runs._write = handler
    events.append(LATE)  # goes on in both processes
    assert events.batch([7])["item"].tolist() == WHOLE
    if events.forked == 0:
        os._exit(0)
    """)


def test_stores_are_collected() -> None:
    """What a fork must know about keeps nothing alive."""
    events = EventSequences({"user": [7], "time": [1]})
    copies = [copy.copy(events), copy.deepcopy(events), pickle.loads(pickle.dumps(events))]
    alive = [weakref.ref(one) for one in (events, *copies)]
    del events, copies
    gc.collect()
    assert [one() for one in alive] == [None] * 4


@pytest.mark.parametrize("cut_off", [KeyboardInterrupt, MemoryError])
def test_an_append_cut_off_in_its_middle(
    cut_off: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C left a history in which an event had taken another one's place."""
    events = EventSequences({"user": [7, 7], "time": [10, 30], "item": [1, 3]}, length=4)
    events.append({"user": [7], "time": [40], "item": [4]})  # leaves room
    write = Runs._write

    def cut(self: Runs, *arguments: object) -> None:
        write(self, *arguments)  # type: ignore[arg-type]
        raise cut_off

    monkeypatch.setattr(Runs, "_write", cut)
    with pytest.raises(cut_off):
        events.append({"user": [7], "time": [20], "item": [2]})
    monkeypatch.undo()
    for call in (
        lambda: events.batch([7]),
        lambda: events.append({"user": [7], "time": [50], "item": [5]}),
        lambda: len(events),
        lambda: pickle.dumps(events),
    ):
        with pytest.raises(RuntimeError, match=r"EventSequences: .* interrupted"):
            call()
