"""Every kernel compiles for every target as it is launched, without spills and with wide loads: no GPU needed."""

import os
from collections import Counter

import pytest

pytest.importorskip("triton")

from tools import disassembly, kernel_sheet
from tools.launches import TARGETS, launches_of

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so is not interpreted")

# Bytes a thread of the loads (and for what is written out, the stores) on NVIDIA's devices, in the loops of a kernel or
# of one that has none. Channels come in 16 bytes, or 2 or 4 values, boxes in what the threads of a program share out;
# flags and counters in as many as they have.
WIDTHS = {
    ("box_iou", "_box_iou_kernel", "stores_in_loops"): {16},
    ("nms 12000 to 2000", "_filter_kernel", "loads_in_loops"): {4},
    ("nms of classes", "_finish_kernel", "loads_in_loops"): {1, 8},
    ("match of anchors", "_best_kernel", "loads_in_loops"): {1, 16},
    ("match of anchors", "_match_kernel", "loads_in_loops"): {1, 4},
    ("match of proposals", "_match_kernel", "loads_in_loops"): {1, 4},
    ("decode", "_decode_kernel", "loads_outside"): {4, 8, 16},
    ("sample of proposals", "_sample_kernel", "loads_outside"): {8},
    ("roi_pool", "_roi_pool_kernel", "loads_in_loops"): {16},
    ("roi_pool", "_roi_pool_backward_kernel", "loads_in_loops"): {4, 8},
    ("roi_pool, bf16", "_roi_pool_kernel", "loads_in_loops"): {16},
    ("roi_pool, bf16", "_roi_pool_backward_kernel", "loads_in_loops"): {4},
    ("roi_align", "_roi_align_kernel", "loads_outside"): {4, 16},
    ("roi_align", "_roi_align_backward_kernel", "loads_in_loops"): {4, 16},
    ("roi_align, bf16", "_roi_align_kernel", "loads_outside"): {4, 16},
    ("roi_align, bf16", "_roi_align_backward_kernel", "loads_in_loops"): {4, 8},
    ("roi_align, adaptive", "_roi_align_kernel", "loads_in_loops"): {16},
}


def widths(counts: str) -> set[int]:
    return {int(part.split(" x ")[1]) for part in counts.split(" + ") if part}


@pytest.mark.parametrize("name", kernel_sheet.CALLS)
def test_kernels_neither_spill_nor_load_in_small_pieces(name):
    launches = launches_of(kernel_sheet.CALLS[name])
    assert launches, "the launcher launched nothing"
    rows = []
    for launch in launches:
        for target in TARGETS:
            compiled = launch.compile(target)
            where = f"{launch.kernel.fn.__name__} on {target}"
            # Triton 3.6's assembler spills 8 bytes of the sampler on sm_80, 16 of suppression's filter on sm_100.
            assert disassembly.usage_of(compiled.asm).spilled <= 16, f"{where} spills"
            assert compiled.metadata.shared <= kernel_sheet.DEVICES[target].program_shared, where
            if target == "sm_90":  # to disassemble takes longer than to compile
                rows.append(kernel_sheet.measure(name, launch, target, compiled))
    for (call, kernel, column), expected in WIDTHS.items():
        found = [getattr(row, column) for row in rows if (row.call, row.kernel) == (call, kernel)]
        assert found or call != name, f"{call} launches no {kernel}"
        for counts in found:
            assert widths(counts) == expected, f"{column} of {kernel}: {counts or 'none'}"


def test_kernels_are_never_fused():
    """A fused multiply-add in an area or a union would move decisions that sit on a threshold."""
    for name, call in kernel_sheet.CALLS.items():
        for launch in launches_of(call):
            assert launch.options().get("enable_fp_fusion") is False, f"{name}: {launch.kernel.fn.__name__}"


NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 LDG.E.U8.CONSTANT R4, [R2.64] ;
        /*0030*/                   LDG.E.64.CONSTANT R8, desc[UR4][R2.64] ;
        /*0040*/                   STG.E [R2.64], R5 ;
        /*0050*/              @!P1 BRA 0x30 ;
        /*0060*/               @P0 BRA `(.L_x_1) 0x80 ;
        /*0070*/               @P2 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_loops_and_widths_are_read_from_sass():
    code = disassembly.sass(NESTED)
    assert len(code.instructions) == 10
    assert code.loops == (frozenset(range(2, 8)), frozenset(range(3, 6)))
    assert code.innermost() == [frozenset(range(3, 6))]
    assert code.longest_loop() == 3
    assert code.accesses(inside=True) == (Counter({1: 1, 8: 1}), Counter({4: 1}))
    assert code.accesses(inside=False) == (Counter({16: 1}), Counter())


RARE_PATH = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   BRA.DIV ~URZ, 0x0050 ;
        /*0020*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0030*/              @!P0 EXIT ;
        /*0040*/                   EXIT ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0060*/                   BRA 0x0020 ;
        /*0070*/                   BRA 0x0070;
"""


def test_a_branch_back_from_a_rare_path_is_no_loop():
    code = disassembly.sass(RARE_PATH)
    assert code.loops == ()
    assert code.longest_loop() == 0
    assert code.accesses(inside=False) == (Counter({16: 1}), Counter({16: 1}))


def test_a_loop_may_be_entered_in_its_middle_and_closed_in_two_places():
    enter, body, test, leave = {2}, {2}, {1, 3}, set()
    assert disassembly.natural_loops([enter, body, test, leave]) == (frozenset({1, 2}),)
    assert disassembly.natural_loops([{1}, {2}, {1, 3}, {1, 4}, set()]) == (frozenset({1, 2, 3}),)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64]", ("load", 32)),
        ("@P0 LDG.E.S16.CONSTANT R4, [R2.64]", ("load", 2)),
        ("LDS.128 R4, [R2]", None),
        ("STG.E.64.STRONG.GPU [R2.64], R4", ("store", 8)),
        ("RED.E.MAX.S32.STRONG.GPU [R2.64], R4", None),
        ("global_load_dwordx3 v[4:6], v2, s[0:1]", ("load", 12)),
        ("buffer_store_byte v1, v2, s[0:3], 0 offen", ("store", 1)),
        ("global_load_short_d16_hi v1, v2, s[0:1]", ("load", 2)),
        ("ds_read_b128 v[0:3], v4", None),
    ],
)
def test_accesses_of_global_memory_have_their_width(instruction, expected):
    assert disassembly.access(instruction) == expected


AMD = """
kernel:
        s_load_dwordx2 s[0:1], s[2:3], 0x0
        global_load_ubyte v1, v2, s[0:1]
.LBB0_1:                                ; a loop
        global_load_dwordx4 v[4:7], v2, s[0:1]
        buffer_load_dword v1, v2, s[0:3], 0 offen
        global_store_short v1, v2, s[0:1]
        s_cbranch_scc1 .LBB0_1
        s_cbranch_scc0 .LBB0_2
.LBB0_2:
        s_endpgm
        .section .rodata
    .private_segment_fixed_size: 12
    .vgpr_count:     34
"""


def test_loops_widths_and_usage_are_read_from_amd_assembly():
    code = disassembly.amdgcn(AMD)
    assert len(code.instructions) == 8
    assert code.loops == (frozenset(range(2, 6)),)
    assert code.accesses(inside=True) == (Counter({16: 1, 4: 1}), Counter({2: 1}))
    assert code.accesses(inside=False) == (Counter({1: 1}), Counter())
    assert disassembly.amd_usage(AMD) == disassembly.Usage(registers=34, spilled=12)


def test_occupancy_counts_whole_programs():
    device = kernel_sheet.DEVICES["sm_90"]
    assert kernel_sheet.occupancy(device, warps=4, registers=32, shared=0) == (1.0, 1.0)
    # 65536 / (96 * 128) = 5.3 programs of 4 warps; 228 KiB hold 2 of 101 KiB.
    assert kernel_sheet.occupancy(device, warps=4, registers=90, shared=100 << 10) == (20 / 64, 8 / 64)
