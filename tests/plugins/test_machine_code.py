"""Counting what a loop executes, on a listing of a few lines."""

from __future__ import annotations

import pytest

from tests.plugins.machine_code import Code

LISTING = """
        /*0000*/                   MOV R1, 0x8 ;
        /*0010*/                   LDS R2, [R1] ;
        /*0020*/              @P1 BRA 0x50 ;
        /*0030*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0040*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0060*/              @!P0 CALL.REL.NOINC 0x80 ;
        /*0070*/                   BRA 0x10 ;
        /*0080*/                   FFMA R9, R4, R9, RZ ;
        /*0090*/              @P2 BRA 0x10 ;
        /*00a0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("counts", "executed"),
    [
        ({"HMMA": 1, "FFMA": 0}, [5, 7]),  # with the two in the middle, and without
        ({"HMMA": 1, "FFMA": 1}, [6, 8]),
        ({"HMMA": 0}, []),
    ],
)
def test_ways_round_a_loop_from_the_cheapest(counts: dict[str, int], executed: list[int]) -> None:
    loop = Code.parse(LISTING).loop("HMMA", "FFMA" if counts.get("FFMA") else "LDS")
    assert loop.ways(2, **counts) == executed


def test_ways_come_to_the_first_more_than_once() -> None:
    assert Code.parse(LISTING).loop("FFMA").ways(1, HMMA=2, FFMA=1) == [5 + 6]
