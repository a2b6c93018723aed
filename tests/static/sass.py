"""The control flow of a kernel's machine code: its loops, and what one way through it executes."""

from __future__ import annotations

import graphlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
# A call without a return address is a jump that brings a diverged warp together.
_JUMPS = ("BRA", "CALL")


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def label(self) -> str:
        """The opcode; a move of what is no register says so."""
        from_register = re.search(r"\bU?R\d+(\.\w+)?$", self.operands.strip())
        return self.opcode if "MOV" not in self.opcode or from_register else f"{self.opcode} const"

    @property
    def is_conditional(self) -> bool:
        return bool(self.guard) or re.match(r"!?U?P\d", self.operands) is not None


def parse(listing: str) -> list[Instruction]:
    """The instructions of one function."""
    return [Instruction(int(a, 16), *rest) for a, *rest in _LINE.findall(listing)]


@dataclass
class Loop:
    """Blocks that lead back to `header`, which all ways into them pass."""

    header: int
    blocks: frozenset[int]
    inner: list[Loop] = field(default_factory=list)


Trips = Callable[[Loop], int]


class Flow:
    """Blocks of a function, in the order of their addresses, and its loops, outermost first."""

    def __init__(self, code: list[Instruction]) -> None:
        index = {instruction.address: i for i, instruction in enumerate(code)}
        targets: dict[int, int] = {}
        starts = {0}
        for i, instruction in enumerate(code):
            if instruction.name in _JUMPS:
                assert instruction.name == "BRA" or ".NOINC" in instruction.opcode, instruction
                targets[i] = index[int(instruction.operands.rpartition("0x")[2].split()[0], 16)]
                starts |= {targets[i], i + 1}
            elif instruction.name == "EXIT":
                starts.add(i + 1)
            assert instruction.name not in ("BRX", "JMX", "RET"), instruction
        bounds = [*sorted(start for start in starts if start < len(code)), len(code)]
        spans = list(itertools.pairwise(bounds))
        block_at = {start: k for k, (start, _) in enumerate(spans)}
        self.blocks = [code[start:end] for start, end in spans]
        self.successors: list[set[int]] = []
        for k, (_, end) in enumerate(spans):
            last = code[end - 1]
            leads_on = last.name not in ("EXIT", *_JUMPS) or last.is_conditional
            following = {k + 1} if leads_on and end < len(code) else set()
            jump = {block_at[targets[end - 1]]} if end - 1 in targets else set()
            self.successors.append(following | jump)
        self._keep_reachable()
        self.loops = self._find_loops()

    def execute(self, trips: Trips) -> Counter[str]:
        """How often a warp meets each opcode.

        Of the ways through a loop or the function it is the one with the most products on tensor
        cores, and of those the shortest.
        """
        reachable = frozenset(range(len(self.blocks))) - self._unreachable
        return self._best_way(Loop(0, reachable, self.loops), trips, is_loop=False)

    def _keep_reachable(self) -> None:
        seen: set[int] = set()
        waiting = [0]
        while waiting:
            k = waiting.pop()
            if k not in seen:
                seen.add(k)
                waiting += self.successors[k]
        self._unreachable = frozenset(range(len(self.blocks))) - seen
        for k in self._unreachable:
            self.successors[k] = set()
        self.predecessors: list[set[int]] = [set() for _ in self.blocks]
        for k, following in enumerate(self.successors):
            for successor in following:
                self.predecessors[successor].add(k)

    def _dominators(self) -> list[int]:
        """Of each block, as bits: the blocks that every way to it passes."""
        everything = (1 << len(self.blocks)) - 1
        result = [1] + [everything] * (len(self.blocks) - 1)
        changed = True
        while changed:
            changed = False
            for k in range(1, len(self.blocks)):
                before = everything
                for predecessor in self.predecessors[k]:
                    before &= result[predecessor]
                changed |= (before | 1 << k) != result[k]
                result[k] = before | 1 << k
        return result

    def _find_loops(self) -> list[Loop]:
        dominators = self._dominators()
        bodies: dict[int, set[int]] = {}
        for k, following in enumerate(self.successors):
            for header in following:
                if dominators[k] >> header & 1:
                    body = bodies.setdefault(header, {header})
                    waiting = [k]
                    while waiting:
                        block = waiting.pop()
                        if block not in body:
                            body.add(block)
                            waiting += self.predecessors[block]
        top: list[Loop] = []
        for header, body in sorted(bodies.items(), key=lambda item: -len(item[1])):
            siblings = top
            while around := [loop for loop in siblings if header in loop.blocks]:
                siblings = around[0].inner
            siblings.append(Loop(header, frozenset(body)))
            siblings.sort(key=lambda loop: loop.header)
        return top

    def _best_way(self, region: Loop, trips: Trips, *, is_loop: bool) -> Counter[str]:
        node_of = {k: k for k in region.blocks}
        cost = {k: Counter(i.label for i in self.blocks[k]) for k in region.blocks}
        for loop in region.inner:
            once = self._best_way(loop, trips, is_loop=True) if trips(loop) else Counter[str]()
            cost[loop.header] = Counter({opcode: trips(loop) * n for opcode, n in once.items()})
            node_of |= dict.fromkeys(loop.blocks, loop.header)
        before: dict[int, set[int]] = {node: set() for node in node_of.values()}
        ends = set()
        for k in region.blocks:
            for successor in self.successors[k]:
                if is_loop and successor == region.header:
                    ends.add(node_of[k])
                elif successor in region.blocks and node_of[successor] != node_of[k]:
                    before[node_of[successor]].add(node_of[k])
            if not is_loop and self.blocks[k][-1].name == "EXIT":
                ends.add(node_of[k])
        total: dict[int, Counter[str]] = {}
        for node in graphlib.TopologicalSorter(before).static_order():
            total[node] = _best(total[b] for b in before[node]) + cost[node]
        return _best(total[end] for end in ends)


def count(opcodes: Counter[str], prefix: str) -> int:
    """How many begin like this."""
    return sum(n for opcode, n in opcodes.items() if opcode.startswith(prefix))


def share_of_moves(opcodes: Counter[str]) -> float:
    """Moves between registers, those in the guise of a multiply-add too; no constants."""
    moves = [n for o, n in opcodes.items() if "MOV" in o and not o.endswith(" const")]
    return sum(moves) / opcodes.total()


def _best(ways: Iterable[Counter[str]]) -> Counter[str]:
    return max(ways, key=lambda way: (count(way, "HMMA"), -way.total()), default=Counter())


class LoopShape(NamedTuple):
    """A loop that holds products, how often it runs, and those within."""

    what: str
    trips: int
    inner: tuple[LoopShape, ...] = ()


def trips_of(flow: Flow, expected: tuple[LoopShape, ...]) -> Trips:
    """How often each loop runs, where those with products are the expected ones, in this order.

    A loop without products counts once.
    """
    found: dict[int, int] = {}

    def match(loops: list[Loop], shapes: tuple[LoopShape, ...]) -> None:
        multiplying = [loop for loop in loops if _multiplies(flow, loop)]
        assert len(multiplying) == len(shapes), (
            f"expected loops with products: {[shape.what for shape in shapes]}, "
            f"got {len(multiplying)} of them"
        )
        for loop, shape in zip(multiplying, shapes, strict=True):
            found[loop.header] = shape.trips
            match(loop.inner, shape.inner)

    match(flow.loops, expected)
    return lambda loop: found.get(loop.header, 1)


def _multiplies(flow: Flow, loop: Loop) -> bool:
    return any(i.name == "HMMA" for k in loop.blocks for i in flow.blocks[k])
