# SPDX-License-Identifier: Apache-2.0
"""Global, local and constant memory of ptxsim: what is loaded and stored, and what is refused."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
import pytest

from ptx_lanes import HEADER, integers, kernel, lanes, ptxsim

Buffer = ptxsim.Buffer


def run(body: str, *buffers: Any, **options: Any) -> ptxsim.Result:
    """A kernel with one pointer per buffer, in registers a, b, c."""
    text = kernel(body, tuple("abc"[: len(buffers)]), options.pop("declarations", ""))
    options = {"grid": 1, "block": 32, **options}
    return ptxsim.load(text).launch("k", args=buffers, **options)


AT = ".reg .b64 x, y;\n.reg .b32 r, s, t, u;\n.reg .b64 v;\n.reg .b16 h;\n.reg .pred p;\n"


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "b32", "u64"])
def test_loads_extend(kind: str) -> None:
    bits = int(kind[1:])
    dtype = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{bits}")
    values = integers(dtype, 32)
    wide = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}64")
    out = Buffer(np.zeros(32, wide), "out")
    size = bits // 8
    register = "v" if bits == 64 else "r"
    widen = "" if bits == 64 else f"cvt.{kind[0].replace('b', 'u')}64.{kind[0].replace('b', 'u')}32"
    body = f"""{AT}
    mad.wide.u32 x, tid, {size}, a;
    mad.wide.u32 y, tid, 8, b;
    ld.global.{kind} {register}, [x];
    {f"{widen} v, r;" if widen else ""}
    st.global.u64 [y], v;
    """
    result = run(body, Buffer(values), out)
    np.testing.assert_array_equal(result[out], values.astype(wide))


def test_vector_access_and_cache_modifiers() -> None:
    values = integers(np.uint32, 128)
    out = Buffer(np.zeros(128, np.uint32), "out")
    body = f"""{AT}
    mad.wide.u32 x, tid, 16, a;
    mad.wide.u32 y, tid, 16, b;
    ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {{r, s, t, u}}, [x];
    st.global.cs.v2.b32 [y+8], {{r, s}};
    st.global.wt.v2.b32 [y], {{t, u}};
    """
    result = run(body, Buffer(values), out)
    expected = values.reshape(32, 2, 2)[:, ::-1].reshape(-1)
    np.testing.assert_array_equal(result[out], expected)
    assert result.stats.sector_overhead("ld.global") == 1


def test_sectors_of_a_strided_load() -> None:
    body = f"{AT} mad.wide.u32 x, tid, 32, a; ld.global.u32 r, [x];"
    stats = run(body, Buffer(np.zeros(256, np.float32))).stats
    (site,) = stats.global_.values()
    assert (site.requests, site.cost, site.ideal) == (1, 32, 4)
    assert stats.sector_overhead() == 8


@pytest.mark.parametrize(
    "offset, where",
    [(-4, "values"), (0, ""), (4, "values"), (1 << 20, ""), (-(1 << 20), "in no buffer")],
)
def test_bounds(offset: int, where: str) -> None:
    body = f"{AT} mad.wide.u32 x, tid, 4, a; ld.global.u32 r, [x+{offset}];"
    values = Buffer(np.zeros(32, np.float32), name="values")
    other = Buffer(np.zeros(1 << 20, np.float32))
    if offset == 0:
        run(body, values, other)
        return
    with pytest.raises(ptxsim.OutOfBounds, match=rf"{where}.*PTX line \d+: ld.global.u32 r"):
        run(body, values, other)


def test_alignment_follows_the_offset_of_a_view() -> None:
    text = kernel(f"{AT} ld.global.v4.u32 {{r, s, t, u}}, [a];", ("a",))
    for offset, bad in ((0, False), (16, False), (8, True), (2, True)):
        arena = ptxsim.Arena()
        address = np.uint64(arena.add(np.zeros(8, np.uint32), offset=offset))
        launch = dict(grid=1, block=1, args=[address], arena=arena)
        if bad:
            with pytest.raises(ptxsim.Misaligned, match="16-byte"):
                ptxsim.load(text).launch("k", **launch)
        else:
            ptxsim.load(text).launch("k", **launch)


def test_reading_what_was_never_written() -> None:
    out = Buffer(np.zeros(32, np.int32), "out")
    body = f"{AT} mad.wide.u32 x, tid, 4, a; ld.global.u32 r, [x];"
    with pytest.raises(ptxsim.Uninitialised, match="never written"):
        run(body, out)
    body = f"{AT} mad.wide.u32 x, tid, 4, a; st.global.u32 [x], tid; ld.global.u32 r, [x];"
    run(body, out)


def test_unwritten_elements_are_reported() -> None:
    out = Buffer(np.zeros(40, np.int32), "out")
    result = run(f"{AT} mad.wide.u32 x, tid, 4, a; st.global.u32 [x], tid;", out)
    np.testing.assert_array_equal(result.written(out), np.arange(40) < 32)


def test_inputs_are_constant() -> None:
    body = f"{AT} mad.wide.u32 x, tid, 4, a; st.global.u32 [x], tid;"
    with pytest.raises(ptxsim.ReadOnly):
        run(body, Buffer(np.zeros(32, np.int32)))


def test_non_coherent_load_of_written_memory() -> None:
    body = f"{AT} mad.wide.u32 x, tid, 4, a; st.global.u32 [x], tid; ld.global.nc.u32 r, [x];"
    with pytest.raises(ptxsim.ReadOnly, match="non-coherent"):
        run(body, Buffer(np.zeros(32, np.int32), "inout"))


BLOCK_WRITES = f"{AT} mov.u32 r, %ctaid.x; mad.wide.u32 x, tid, 4, a; st.global.u32 [x], r;"


def test_two_blocks_write_one_place() -> None:
    out = Buffer(np.zeros(32, np.int32), "out")
    run(BLOCK_WRITES, out)
    with pytest.raises(ptxsim.Race, match="another block"):
        run(BLOCK_WRITES, out, grid=2)


def test_a_block_reads_what_another_wrote() -> None:
    body = f"""{AT}
    mov.u32 r, %ctaid.x;
    setp.eq.u32 p, r, WHO;
    mad.wide.u32 x, tid, 4, a;
    @p st.global.u32 [x], r;
    @!p ld.global.u32 s, [x];
    """
    for writer in ("0", "1"):
        buffer = Buffer(np.zeros(32, np.int32), "inout")
        with pytest.raises(ptxsim.Race, match="another block"):
            run(body.replace("WHO", writer), buffer, grid=2)


def test_launches_one_after_the_other_do_not_race() -> None:
    arena = ptxsim.Arena()
    address = arena.add(np.zeros(32, np.int32), "inout")
    module = ptxsim.load(kernel(BLOCK_WRITES, ("a",)))
    for _ in range(2):
        module.launch("k", grid=1, block=32, args=[np.uint64(address)], arena=arena)
    np.testing.assert_array_equal(arena.get(address), 0)


def test_lanes_write_one_place() -> None:
    with pytest.raises(ptxsim.Race):
        run("st.global.u32 [a], tid;", Buffer(np.zeros(1, np.int32), "out"))


def test_lanes_exchange_through_global_memory() -> None:
    body = f"""{AT}
    mad.wide.u32 x, tid, 4, a;
    st.global.u32 [x], tid;
    BARRIER
    xor.b32 r, tid, 1;
    mad.wide.u32 y, r, 4, a;
    ld.global.u32 s, [y];
    """
    buffer = Buffer(np.zeros(64, np.int32), "out")
    run(body.replace("BARRIER", "bar.sync 0;"), buffer, block=64)
    with pytest.raises(ptxsim.Race):
        run(body.replace("BARRIER", ""), buffer, block=64)


ATOMICS = {
    "add.u32": (np.uint32, lambda v: v.sum(dtype=np.uint32)),
    "add.s32": (np.int32, lambda v: v.sum(dtype=np.int32)),
    "add.u64": (np.uint64, lambda v: v.sum(dtype=np.uint64)),
    "max.s32": (np.int32, np.max),
    "min.u32": (np.uint32, np.min),
    "xor.b32": (np.uint32, np.bitwise_xor.reduce),
}


@pytest.mark.parametrize("name", ATOMICS)
def test_global_reductions(name: str) -> None:
    dtype, reduce = ATOMICS[name]
    values = integers(dtype, 64)
    size = values.dtype.itemsize
    register = "v" if size == 8 else "r"
    total = Buffer(values[:1] * 0, "inout")
    body = f"""{AT}
    .reg .b32 i;
    mov.u32 i, %ctaid.x;
    mad.lo.u32 i, i, 32, tid;
    mad.wide.u32 x, i, {size}, a;
    ld.global.b{8 * size} {register}, [x];
    red.relaxed.gpu.global.{name} [b], {register};
    """
    result = run(body, Buffer(values), total, grid=2)
    assert result[total][0] == reduce(np.append(values, dtype(0)))


def test_atomics_return_what_was_there() -> None:
    counter, out = Buffer(np.zeros(1, np.uint32), "inout"), Buffer(np.zeros(32, np.uint32), "out")
    body = f"""{AT}
    atom.global.add.u32 r, [a], 1;
    mad.wide.u32 x, tid, 4, b;
    st.global.u32 [x], r;
    atom.global.cas.b32 s, [a], 32, 1000;
    atom.global.max.s32 t, [a], tid;
    """
    result = run(body, counter, out)
    np.testing.assert_array_equal(np.sort(result[out]), np.arange(32))
    assert result[counter][0] == 1000


def test_float_atomics() -> None:
    total = Buffer(np.zeros(1, np.float32), "inout")
    body = f"{AT} cvt.rn.f32.u32 r, tid; red.global.add.f32 [a], r;"
    assert run(body, total, grid=3)[total][0] == 3 * 31 * 16


def test_plain_write_beside_atomics() -> None:
    buffer = Buffer(np.zeros(1, np.uint32), "inout")
    body = f"{AT} red.global.add.u32 [a], 1; setp.eq.u32 p, tid, 3; @p st.global.u32 [a], tid;"
    with pytest.raises(ptxsim.Race):
        run(body, buffer)


def test_local_memory_is_private() -> None:
    body = """
    .local .align 16 .b8 depot[64];
    .reg .b64 base, at, generic;
    mov.u64 base, depot;
    mad.wide.u32 at, a, 4, base;
    st.local.u32 [at], b;
    cvta.local.u64 generic, at;
    ld.u32 d, [generic];
    """
    a = (np.arange(64) % 16).astype(np.uint32)
    b = integers(np.uint32, 64)
    np.testing.assert_array_equal(lanes(body, {"a": a, "b": b}, {"d": np.uint32})["d"], b)
    with pytest.raises(ptxsim.OutOfBounds, match="local"):
        lanes(body, {"a": a + 1, "b": b}, {"d": np.uint32})
    with pytest.raises(ptxsim.Uninitialised, match="local"):
        lanes(
            body.replace("st.local", "@!tid_p st.local").replace(
                "mov.u64 base", ".reg .pred tid_p; setp.ge.u32 tid_p, tid, 0; mov.u64 base"
            ),
            {"a": a, "b": b},
            {"d": np.uint32},
        )


VARIABLES = """
.const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0};
.global .align 4 .u32 seen = 7;
.global .align 8 .u64 where = generic(seen);
"""


def test_module_variables() -> None:
    body = f"""{AT}
    and.b32 r, tid, 3;
    mov.u64 x, table;
    mad.wide.u32 x, r, 4, x;
    ld.const.u32 s, [x];
    mad.wide.u32 y, tid, 4, a;
    st.global.u32 [y], s;
    ld.global.u64 v, [where];
    red.global.add.u32 [v], s;
    """
    out = Buffer(np.zeros(32, np.int32), "out")
    result = run(body, out, declarations=VARIABLES)
    np.testing.assert_array_equal(result[out], np.arange(32) % 4 + 1)
    assert result.variable("seen").view(np.uint32)[0] == 7 + 80
    table = np.array([5, 6, 7, 8], np.int32)
    result = run(body, out, declarations=VARIABLES, variables={"table": table})
    np.testing.assert_array_equal(result[out], np.arange(32) % 4 + 5)
    with pytest.raises(ptxsim.ReadOnly):
        run(f"{AT} mov.u64 x, table; st.global.u32 [x], tid;", declarations=VARIABLES, block=1)
    with pytest.raises(ptxsim.LaunchError, match="table has 16 bytes"):
        run(body, out, declarations=VARIABLES, variables={"table": table[:2]})


STRUCT = f"""{HEADER}
.visible .entry k(.param .align 8 .b8 p[24])
{{
.reg .b64 x, base, out;
.reg .b32 tid, n, s;
.reg .pred q;
ld.param.u64 out, [p+8];
ld.param.u32 n, [p+16];
mov.u64 base, p;
ld.param.f32 s, [base+20];
ld.param.u64 x, [p];
mov.u32 tid, %tid.x;
setp.ge.u32 q, tid, n;
@q exit;
mad.wide.u32 x, tid, 4, x;
mad.wide.u32 out, tid, 4, out;
ld.global.f32 n, [x];
mul.f32 n, n, s;
st.global.f32 [out], n;
ret;
}}
"""


class ScaleParams(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("n", ctypes.c_int),
        ("s", ctypes.c_float),
    )


def test_struct_parameter() -> None:
    module = ptxsim.load(STRUCT)
    values = np.arange(20, dtype=np.float32)
    for as_bytes in (True, False):
        arena = ptxsim.Arena()
        x, out = arena.add(values), arena.add(values, "out")
        packed = struct.pack("<QQif", x, out, 20, 1.5)
        argument = packed if as_bytes else ScaleParams(x, out, 20, 1.5)
        module.launch("k", grid=1, block=32, args=[argument], arena=arena)
        np.testing.assert_array_equal(arena.get(out), values * np.float32(1.5))
    with pytest.raises(ptxsim.LaunchError, match="24 bytes"):
        module.launch("k", grid=1, block=32, args=[packed[:-4]])


def test_parameters_end() -> None:
    text = STRUCT.replace("[base+20]", "[base+24]")
    arena = ptxsim.Arena()
    argument = struct.pack("<QQif", arena.add(np.zeros(1)), arena.add(np.zeros(1)), 0, 0)
    with pytest.raises(ptxsim.OutOfBounds, match="parameter"):
        ptxsim.load(text).launch("k", grid=1, block=32, args=[argument], arena=arena)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(args=[]), "1 parameters, got 0"),
        (dict(args=[3]), "argument 0 must be"),
        (dict(args=[np.int32(3)]), "must have 8 bytes"),
        (dict(block=1025), "block must be"),
        (dict(block=(32, 33)), "at most 1024"),
        (dict(grid=0), "grid must be"),
        (dict(schedule="chaos"), "schedule must be"),
    ],
)
def test_wrong_launches(change: dict[str, Any], message: str) -> None:
    module = ptxsim.load(kernel("", ("a",)))
    options = {"grid": 1, "block": 32, "args": [Buffer(np.zeros(1))], **change}
    with pytest.raises(ptxsim.LaunchError, match=message):
        module.launch("k", **options)
    with pytest.raises(ptxsim.LaunchError, match="kernel must be"):
        module.launch("other", grid=1, block=32)


def test_block_limits_of_a_kernel() -> None:
    text = kernel("").replace("()\n{", "()\n.maxntid 64, 1, 1\n.minnctapersm 2\n{")
    ptxsim.load(text).launch("k", grid=1, block=64)
    with pytest.raises(ptxsim.LaunchError, match="blocks of 64"):
        ptxsim.load(text).launch("k", grid=1, block=96)
    exact = ptxsim.load(text.replace("maxntid", "reqntid"))
    with pytest.raises(ptxsim.LaunchError, match="needs blocks"):
        exact.launch("k", grid=1, block=32)


def test_generic_access_by_address() -> None:
    body = """
    .shared .align 4 .b8 buffer[128];
    .reg .b64 x, y, mixed;
    .reg .b32 even, z;
    .reg .pred p, q;
    mov.u64 x, buffer;
    cvta.shared.u64 x, x;
    mad.wide.u32 x, tid, 4, x;
    mad.wide.u32 y, tid, 4, p_a;
    cvta.to.global.u64 y, y;
    st.u32 [x], tid;
    and.b32 even, tid, 1;
    setp.eq.u32 p, even, 0;
    selp.b64 mixed, x, y, p;
    ld.u32 d, [mixed];
    isspacep.shared q, mixed;
    selp.b32 e, 1, 0, q;
    """
    a = integers(np.uint32, 32)
    got = lanes(body, {"a": a}, {"d": np.uint32, "e": np.uint32})
    even = np.arange(32) % 2 == 0
    np.testing.assert_array_equal(got["d"], np.where(even, np.arange(32), a))
    np.testing.assert_array_equal(got["e"], even)
    with pytest.raises(ptxsim.OutOfBounds, match="in no memory"):
        lanes(".reg .b64 x; mov.u64 x, 0; ld.u32 d, [x];", {"a": a}, {"d": np.uint32})
