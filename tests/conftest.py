"""Settings of every test, what runs on one worker, and the table of what was not run."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

#: Whose tests take long and share nothing: each goes to a worker of its own, and they go first.
APART = ("triton", "cpp")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, restored after a test that asks for more: tiny problems lose by them."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--best-isa",
        action="store_true",
        help="of the tests of each instruction set, only those of the best that runs here",
    )
    parser.addoption(
        "--require-aarch64",
        action="store_true",
        help="the cross compiler and the emulator of AArch64 are here, and their test may not skip",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("best_isa"):
        keep_best_isa(config, items)
    items.sort(key=lambda item: not is_apart(item.nodeid))


def is_apart(nodeid: str) -> bool:
    return nodeid.startswith(tuple(f"tests/{name}/" for name in APART))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays on one worker, since its tests share oracles, modules and builds."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if is_apart(nodeid) else nodeid.partition("::")[0]

    return FilesTogether(config, log)


def keep_best_isa(config: pytest.Config, items: list[pytest.Item]) -> None:
    from seqkernels.backends import cpu

    best = next((status.name for status in cpu.isa_table() if status.chosen), None)

    def wanted(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        return callspec is None or callspec.params.get("isa", best) == best

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items[:1]:
        stash = item.config.stash
        stash[LEFT_OUT] = stash.get(LEFT_OUT, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells how many tests it left out; all leave out the same."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was not run and why, so that nobody takes a skip for a pass."""
    skipped = Counter(reason_of(report) for report in terminalreporter.getreports("skipped"))
    config = terminalreporter.config
    left_out = config.stash.get(LEFT_OUT, 0)
    if not skipped and not left_out:
        return
    terminalreporter.section("not run")
    for reason, count in sorted(skipped.items()):
        terminalreporter.write_line(f"{count:6}  {reason}")
    if left_out:
        chosen = [config.getoption("markexpr"), config.getoption("keyword")]
        chosen += ["the best instruction set"] if config.getoption("best_isa") else []
        terminalreporter.write_line(f"{left_out:6}  left out by: {', '.join(filter(None, chosen))}")


def reason_of(report: pytest.TestReport) -> str:
    """What the test says, or what `importorskip` and `skipif` say for it."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(getattr(report, "wasxfail", report.longrepr))
