"""What is read from a schedule: bundles, loops and how often they run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from tpu_cycles import Loop, read  # noqa: E402

# Two bundles, a loop of three that runs seven times in one of two that runs twice, and a last one.
PROGRAM = """
     0   :  { %s1 = smov 0 }
   0x1   :  { %s2 = smov 0 }
   0x2 LB: > { %s3 = sadd.s32 1, %s2 }
   0x3 LB: >> { %v1 = vadd.f32 %v0, %v0 }
   0x4   : >> { %p1 = scmp.ge.s32.totalorder %s4, 7 /* loop exit test */ }
   0x5   : >> { %6 = sbr.rel (!%p1) target bundleno = 3 (0x3) }
   0x6   : > { %p2 = scmp.eq.s32.totalorder %s3, 2 /* loop exit test */ }
   0x7   : > { %7 = sbr.rel (!%p2) target bundleno = 2 (0x2) }
   0x8   :  { %8 = vsyncadd 1 }
"""


def test_bundles_count_as_often_as_the_loops_around_them_run() -> None:
    schedule = read(PROGRAM)
    assert schedule.bundles == 9
    assert schedule.loops == (Loop(3, 5, 7), Loop(2, 7, 2))
    assert schedule.cycles == 3 + 2 * (3 + 7 * 3)


def test_a_loop_of_unknown_length_counts_once() -> None:
    schedule = read(PROGRAM.replace("loop exit test", "something else"))
    assert {loop.trips for loop in schedule.loops} == {None}
    assert schedule.cycles == 9
