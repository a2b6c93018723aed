"""The reader of machine code, on little listings of which everything is known."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.static.sass import Flow, LoopShape, count, parse, share_of_moves, trips_of

# An outer loop of two inner ones, the second with two ways through it; then a way out in the middle
# and a jump in the guise of a call. Addresses count instructions.
NESTED = """
    /*0000*/                   MOV R1, c[0x0][0x28] ;
    /*0010*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
    /*0020*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
    /*0030*/              @P0  BRA 0x20 ;
    /*0040*/                   FADD R1, R2, R3 ;
    /*0050*/             @!P1  BRA 0x80 ;
    /*0060*/                   HMMA.1688.F32.BF16 R0, R4, R8, R0 ;
    /*0070*/                   BRA 0xa0 ;
    /*0080*/                   FMUL R1, R2, R3 ;
    /*0090*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;
    /*00a0*/                   BRA.U UP0, 0x40 ;
    /*00b0*/               @P2 EXIT ;
    /*00c0*/               @P1 CALL.REL.NOINC 0xe0 ;
    /*00d0*/                   BRA 0x10 ;
    /*00e0*/                   STG.E [R2], R3 ;
    /*00f0*/                   EXIT ;
    /*0100*/                   BRA 0x100 ;
"""
SHAPE = (LoopShape("outer", 2, (LoopShape("first", 3), LoopShape("second", 5))),)


def flow() -> Flow:
    return Flow(parse(NESTED))


def test_loops_are_found() -> None:
    (outer,) = flow().loops
    assert [len(inner.inner) for inner in outer.inner] == [0, 0]
    starts = [flow().blocks[loop.header][0].address for loop in (outer, *outer.inner)]
    assert starts == [0x10, 0x20, 0x40]


def test_trips_multiply() -> None:
    code = flow().execute(trips_of(flow(), SHAPE))
    assert count(code, "HMMA.16816") == 2 * (1 + 3)
    assert count(code, "HMMA.1688") == 2 * 5  # the way with products, not that with a move
    assert code["FADD"] == 2 * 5
    assert code["FMUL"] == code["IMAD.MOV.U32"] == 0
    assert code["MOV const"] == 1


def test_the_shortest_of_equal_ways_is_taken() -> None:
    code = flow().execute(trips_of(flow(), SHAPE))
    assert code["STG.E"] == 0  # the guarded exit leaves earlier
    assert code["EXIT"] == 2  # met each time around


def test_a_loop_that_never_runs_costs_nothing() -> None:
    shape = (LoopShape("outer", 1, (LoopShape("first", 0), LoopShape("second", 1))),)
    code = flow().execute(trips_of(flow(), shape))
    assert count(code, "HMMA.16816") == 1
    assert count(code, "HMMA.1688") == 1


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (LoopShape("outer", 2),),
        (LoopShape("first", 3), LoopShape("second", 5)),
        (LoopShape("outer", 2, (LoopShape("first", 3, (LoopShape("second", 5),)),)),),
    ],
)
def test_other_loops_than_expected_are_an_error(shape: tuple[LoopShape, ...]) -> None:
    with pytest.raises(AssertionError, match="expected loops with products"):
        trips_of(flow(), shape)


@pytest.mark.parametrize("line", ["BRX R2 -0x10", "CALL.REL 0x0", "RET.REL.NODEC R2 0x0"])
def test_what_cannot_be_followed_is_an_error(line: str) -> None:
    with pytest.raises(AssertionError):
        Flow(parse(f"    /*0000*/                   {line} ;\n"))


def test_moves_are_counted_in_every_guise() -> None:
    moves = ("MOV R1, R2", "IMAD.MOV.U32 R1, RZ, RZ, R2.reuse", "UMOV UR1, UR2")
    others = ("MOV R1, c[0x0][0x28]", "IMAD.MOV.U32 R1, RZ, RZ, RZ", "MOV R1, 0x1", "FADD R1, R2")
    lines = [f"    /*{i:04x}*/ {line} ;" for i, line in enumerate((*moves, *others))]
    code = Counter(instruction.label for instruction in parse("\n".join(lines)))
    assert share_of_moves(code) == 3 / 7


def test_two_ways_into_a_loop_are_no_loop() -> None:
    """Its trips would mean nothing."""
    listing = """
    /*0000*/              @P0  BRA 0x20 ;
    /*0010*/                   FADD R1, R2, R3 ;
    /*0020*/                   FMUL R1, R2, R3 ;
    /*0030*/              @P1  BRA 0x10 ;
    /*0040*/                   EXIT ;
"""
    irregular = Flow(parse(listing))
    assert irregular.loops == []
    with pytest.raises(ValueError, match="cycle"):
        irregular.execute(lambda loop: 1)
