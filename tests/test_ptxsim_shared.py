# SPDX-License-Identifier: Apache-2.0
"""Shared memory of ptxsim: races, barriers, asynchronous copies, bank conflicts.

Every detector is shown a program that is right and one that lacks exactly one thing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptx_lanes import kernel, launch, ptxsim

BUFFER = """
.shared .align 16 .b8 buffer[4096];
.reg .b32 at, other, r, s, t, u, warp, lane, n;
.reg .pred p, q;
mov.u32 at, buffer;
mad.lo.u32 at, tid, 4, at;
shr.u32 warp, tid, 5;
and.b32 lane, tid, 31;
"""


def run(body: str, block: int = 64, **options: Any) -> ptxsim.Result:
    return launch(BUFFER + body, block=block, **options)


def fails(error: type[Exception], match: str, body: str, block: int = 64, **options: Any) -> None:
    with pytest.raises(error, match=match or None):
        run(body, block, **options)


EXCHANGE = """
st.shared.u32 [at], tid;
BARRIER
xor.b32 other, tid, 32;
mov.u32 r, buffer;
mad.lo.u32 other, other, 4, r;
ld.shared.u32 r, [other];
"""


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_write_then_read_needs_a_barrier(schedule: str) -> None:
    good = EXCHANGE.replace("BARRIER", "bar.sync 0;")
    assert run(good, schedule=schedule).stats.barriers[0] == 1
    for weak in ("", "bar.warp.sync -1;", "membar.cta;"):
        with pytest.raises((ptxsim.Race, ptxsim.Uninitialised)):
            run(EXCHANGE.replace("BARRIER", weak), schedule=schedule)


def test_race_names_both_lanes_and_the_line() -> None:
    fails(
        ptxsim.Race,
        r"lane 0 reads shared byte 128, written by lane 32.*ld.shared.u32 r, \[other\]",
        EXCHANGE.replace("BARRIER", ""),
    )


def test_read_then_write_needs_a_barrier() -> None:
    again = "\nBARRIER\nst.shared.u32 [at], r;"
    body = EXCHANGE.replace("BARRIER", "bar.sync 0;") + again
    run(body.replace("BARRIER", "bar.sync 0;"))
    fails(ptxsim.Race, "read by lane", body.replace("BARRIER", ""))


def test_write_after_many_reads() -> None:
    body = """
    st.shared.u32 [at], tid;
    bar.sync 0;
    ld.shared.u32 r, [buffer];
    BARRIER
    st.shared.u32 [at], tid;
    """
    run(body.replace("BARRIER", "bar.sync 0;"))
    fails(ptxsim.Race, "read by several lanes of warp", body.replace("BARRIER", ""))


def test_two_lanes_write_one_byte() -> None:
    fails(ptxsim.Race, "at once", "st.shared.u32 [buffer], tid;")
    fails(
        ptxsim.Race,
        "written by lane",
        "st.shared.u32 [at], tid; xor.b32 r, tid, 1; mov.u32 s, buffer; mad.lo.u32 s, r, 4, s;"
        "st.shared.u32 [s], tid;",
    )


def test_bytes_of_one_word_are_told_apart() -> None:
    run("mov.u32 r, buffer; add.u32 r, r, tid; st.shared.u8 [r], tid; ld.shared.u8 s, [r];")
    fails(
        ptxsim.Race,
        "shared byte",
        "mov.u32 r, buffer; add.u32 r, r, tid; st.shared.u8 [r], tid; ld.shared.u32 s, [buffer];",
    )


WITHIN_WARP = """
st.shared.u32 [at], tid;
BARRIER
xor.b32 other, tid, 1;
mov.u32 r, buffer;
mad.lo.u32 other, other, 4, r;
ld.shared.u32 r, [other];
SECOND
st.shared.u32 [at], tid;
"""


def test_warp_barrier_orders_its_warp() -> None:
    sync = "bar.warp.sync -1;"
    run(WITHIN_WARP.replace("BARRIER", sync).replace("SECOND", sync))
    missing = WITHIN_WARP.replace("BARRIER", "").replace("SECOND", sync)
    fails(ptxsim.Race, "written by", missing)
    missing = WITHIN_WARP.replace("BARRIER", sync).replace("SECOND", "")
    fails(ptxsim.Race, "read by", missing)


def test_shuffle_is_no_memory_barrier() -> None:
    shuffle = "shfl.sync.bfly.b32 s, tid, 1, 31, -1;"
    fails(ptxsim.Race, "", WITHIN_WARP.replace("BARRIER", shuffle).replace("SECOND", ""))


def test_warp_barrier_of_half_a_warp() -> None:
    body = """
    setp.lt.u32 p, lane, 16;
    st.shared.u32 [at], tid;
    @!p bra $join;
    bar.warp.sync 0xffff;
    xor.b32 other, tid, OTHER;
    mov.u32 r, buffer;
    mad.lo.u32 other, other, 4, r;
    ld.shared.u32 r, [other];
    $join:
    """
    run(body.replace("OTHER", "8"))
    fails(ptxsim.Race, "", body.replace("OTHER", "16"))


NAMED = """
setp.lt.u32 p, warp, 2;
@!p bra $consumer;
st.shared.u32 [at], tid;
PRODUCED
bra.uni $end;
$consumer:
CONSUME
sub.u32 other, tid, 64;
mov.u32 r, buffer;
mad.lo.u32 other, other, 4, r;
ld.shared.u32 r, [other];
$end:
"""


def test_named_barrier_between_groups_of_warps() -> None:
    def body(produced: str, consume: str) -> str:
        return NAMED.replace("PRODUCED", produced).replace("CONSUME", consume)

    result = run(body("bar.arrive 1, 128;", "bar.sync 1, 128;"), block=128)
    assert result.stats.barriers == {1: 1}
    run(body("barrier.cta.arrive 1, 128;", "barrier.cta.sync 1, 128;"), block=128)
    fails(ptxsim.Race, "", body("", ""), block=128, schedule="lockstep")
    fails(ptxsim.Race, "", body("bar.sync 1, 64;", "bar.sync 2, 64;"), block=128)
    fails(ptxsim.Deadlock, "96 threads|64 of 128", body("", "bar.sync 1, 128;"), block=128)


def test_groups_with_barriers_of_their_own_do_not_disturb_each_other() -> None:
    body = """
    shr.u32 n, warp, 1;
    add.u32 n, n, 1;
    st.shared.u32 [at], tid;
    bar.sync n, 64;
    xor.b32 other, tid, 32;
    mov.u32 r, buffer;
    mad.lo.u32 other, other, 4, r;
    ld.shared.u32 r, [other];
    bar.sync n, 64;
    st.shared.u32 [other], tid;
    """
    assert run(body, block=128).stats.barriers == {1: 2, 2: 2}
    run(body, block=128, schedule="random", seed=3)
    fails(ptxsim.Race, "", body.replace("tid, 32;\n    mov", "tid, 64;\n    mov"), block=128)


def test_barrier_votes() -> None:
    body = """
    setp.lt.u32 p, tid, 40;
    bar.red.popc.u32 r, 0, p;
    bar.red.and.pred q, 1, 64, p;
    setp.eq.and.u32 p, r, 40, !q;
    @!p trap;
    """
    run(body)
    fails(ptxsim.Trap, "trap", body.replace("tid, 40", "tid, 41"))


def test_divergent_barriers() -> None:
    fails(ptxsim.Divergence, "1 of 32 lanes", "setp.eq.u32 p, tid, 0; @p bar.sync 0;")
    fails(ptxsim.Deadlock, "32 have exited", "setp.lt.u32 p, tid, 32; @p exit; bar.sync 0;")
    fails(ptxsim.Deadlock, "32 of 64", "setp.lt.u32 p, tid, 32; @p bar.sync 0;")
    fails(ptxsim.Divergence, "no number of threads", "bar.sync 0, 48;")
    fails(ptxsim.Divergence, "there are 16", "bar.sync 16;")


def test_last_warp_may_be_incomplete() -> None:
    good = EXCHANGE.replace("BARRIER", "bar.sync 0;").replace("tid, 32;", "tid, 1;")
    for schedule in ("lockstep", "random"):
        assert run(good, block=40, schedule=schedule).stats.barriers[0] == 1


def test_uninitialised_and_out_of_bounds() -> None:
    fails(ptxsim.Uninitialised, "shared byte 0", "ld.shared.u32 r, [at];")
    fails(ptxsim.OutOfBounds, "byte 4096 of 4096", "st.shared.u32 [at+4096], tid;", block=1)
    fails(ptxsim.OutOfBounds, "of 4096", "mov.u32 r, 0; st.shared.u32 [r], tid;", block=1)
    fails(ptxsim.Misaligned, "4-byte", "st.shared.u32 [at+2], tid;")
    fails(ptxsim.Misaligned, "8-byte", "st.shared.v2.u32 [at], {tid, tid};")


def test_memory_does_not_survive_a_block() -> None:
    body = "mov.u32 r, %ctaid.x; setp.eq.u32 p, r, 0; @p st.shared.u32 [at], tid;"
    fails(ptxsim.Uninitialised, r"block \(1, 0, 0\)", body + "ld.shared.u32 r, [at];", grid=2)


def test_dynamic_shared_memory() -> None:
    text = kernel(
        ".reg .b32 at; mov.u32 at, dyn; mad.lo.u32 at, tid, 4, at; st.shared.u32 [at], tid;",
        declarations=".extern .shared .align 16 .b8 dyn[];\n.shared .align 4 .b8 fixed[20];",
    )
    module = ptxsim.load(text)
    module.launch("k", grid=1, block=32, dynamic_shared=128)
    with pytest.raises(ptxsim.OutOfBounds):
        module.launch("k", grid=1, block=32, dynamic_shared=124)


def test_shared_atomics() -> None:
    body = """
    setp.eq.u32 p, tid, 0;
    @p st.shared.u32 [buffer], 0;
    FIRST
    atom.shared.add.u32 r, [buffer], 1;
    SECOND
    ld.shared.u32 s, [buffer];
    setp.ne.u32 p, s, 64;
    @p trap;
    """
    sync = "bar.sync 0;"
    run(body.replace("FIRST", sync).replace("SECOND", sync))
    fails(ptxsim.Race, "atomic", body.replace("FIRST", "").replace("SECOND", sync))
    fails(ptxsim.Race, "atomic", body.replace("FIRST", sync).replace("SECOND", ""))


# Asynchronous copies.

COPY = """
.reg .b64 from;
mov.u32 at, buffer;
mad.lo.u32 at, tid, 16, at;
mad.wide.u32 from, tid, 16, a;
cp.async.cg.shared.global [at], [from], 16;
cp.async.commit_group;
MORE
WAIT
BARRIER
ld.shared.v4.u32 {r, s, t, u}, [READ];
"""


def copy(
    wait: str = "cp.async.wait_group 0;",
    barrier: str = "bar.sync 0;",
    more: str = "",
    read: str = "at",
    change: tuple[str, str] = ("", ""),
    size: int = 256,
    body: str = COPY,
) -> ptxsim.Result:
    body = body.replace("WAIT", wait).replace("BARRIER", barrier).replace("MORE", more)
    body = (BUFFER + body).replace("READ", read).replace(*change)
    source = ptxsim.Buffer(np.arange(size, dtype=np.uint32))
    module = ptxsim.load(kernel(body, ("a",)))
    return module.launch("k", grid=1, block=64, args=[source])


def test_copy_waits() -> None:
    copy()
    copy(barrier="")
    copy(wait="cp.async.wait_all;")
    with pytest.raises(ptxsim.PendingCopy, match="reads"):
        copy(wait="")
    with pytest.raises(ptxsim.PendingCopy, match="reads"):
        copy(wait="cp.async.wait_group 1;")
    with pytest.raises(ptxsim.PendingCopy, match="reads"):
        copy(change=("cp.async.commit_group;", ""))


def test_copy_of_another_thread_needs_a_barrier() -> None:
    copy(read="buffer")
    with pytest.raises(ptxsim.Race):
        copy(barrier="", read="buffer")


SECOND_GROUP = "cp.async.ca.shared.global [at+1024], [from], 16;\ncp.async.commit_group;"


def test_groups_arrive_in_order() -> None:
    newest = "cp.async.wait_group 0;\nld.shared.u32 n, [at+1024];"
    copy(more=SECOND_GROUP, wait=newest)
    late = "cp.async.wait_group 1;\nld.shared.u32 n, [at];\ncp.async.wait_group 0;"
    copy(more=SECOND_GROUP, wait=late)
    with pytest.raises(ptxsim.PendingCopy, match="reads"):
        copy(more=SECOND_GROUP, wait=late.replace("[at]", "[at+1024]"))
    with pytest.raises(ptxsim.PendingCopy, match="never waited"):
        copy(more=SECOND_GROUP, wait="cp.async.wait_group 1;")


def test_overwriting_a_stage() -> None:
    with pytest.raises(ptxsim.PendingCopy, match="writes"):
        copy(more="st.shared.u32 [at], tid;")
    reuse = "ld.shared.u32 n, [buffer];\nBAR\ncp.async.ca.shared.global [at], [from], 4;"
    wait = "cp.async.wait_all;\nbar.sync 0;\n" + reuse + "\ncp.async.wait_all;"
    copy(wait=wait.replace("BAR", "bar.sync 0;"))
    with pytest.raises(ptxsim.Race, match="read by"):
        copy(wait=wait.replace("BAR", ""))


def test_zero_fill() -> None:
    """What lies beyond the given number of bytes is zero and is not read from global memory."""
    traps = "\nsetp.ne.u32 p, {}, 0;\n@p trap;"
    for amount, zeros in ((0, "rstu"), (4, "stu"), (8, "tu")):
        body = COPY + "".join(traps.format(x) for x in zeros)
        change = ("16;\ncp.async.commit", f"16, {amount};\ncp.async.commit")
        copy(change=change, body=body)
        copy(change=change, size=64 * 4 - 4 + amount // 4, body=body)
    with pytest.raises(ptxsim.Trap):
        copy(body=COPY + traps.format("u"))
    with pytest.raises(ptxsim.OutOfBounds):
        copy(size=64 * 4 - 1)


def test_copy_alignment_and_bounds() -> None:
    for change in (("[at], [from]", "[at+8], [from]"), ("[at], [from]", "[at], [from+8]")):
        with pytest.raises(ptxsim.Misaligned, match="16-byte"):
            copy(change=change)
    with pytest.raises(ptxsim.OutOfBounds, match="global"):
        copy(size=255)
    with pytest.raises(ptxsim.OutOfBounds, match="shared"):
        copy(change=("[at], [from]", "[at+4096], [from]"))


# Statistics.


@pytest.mark.parametrize(
    "stride, degree", [(4, 1), (8, 2), (16, 4), (128, 32), (132, 1), (0, 1), (12, 1)]
)
def test_bank_conflicts_of_words(stride: int, degree: int) -> None:
    fill = "mov.u32 r, buffer; mad.lo.u32 r, tid, 128, r; " + "".join(
        f"st.shared.u32 [r+{4 * i}], tid;" for i in range(32)
    )
    body = f"{fill} bar.sync 0; mov.u32 r, buffer; mad.lo.u32 at, tid, {stride}, r;"
    stats = run(body + "\nld.shared.u32 s, [at];", block=32).stats
    assert stats.bank_conflicts("ld.shared") == degree
    assert stats.bank_conflicts("st.shared") == 32


@pytest.mark.parametrize("stride, degree", [(16, 1), (32, 2), (128, 8), (144, 1)])
def test_bank_conflicts_of_16_bytes(stride: int, degree: int) -> None:
    body = f"mov.u32 r, buffer; mad.lo.u32 at, tid, {stride}, r;"
    body += "st.shared.v4.u32 [at], {tid, tid, tid, tid};"
    assert run(body, block=16).stats.bank_conflicts() == degree


def test_instruction_counts() -> None:
    stats = run("st.shared.u32 [at], tid; add.u32 r, tid, 1;", grid=3).stats
    assert stats.opcodes["st.shared.u32"] == 3 * 2
    assert stats.count("add") == 6
    assert stats.warp_instructions == sum(stats.lines.values())
