"""The descriptors of wgmma, read out of machine code; what the checks of chapter 6 say about a missing commit."""

from pathlib import Path

import torch

from fa_reference.course import chapter
from fa_reference.grading import descriptors
from fa_reference.kernels import sass_instructions
from fa_reference.versions import load_file


def product(register: int, accumulator: str = "R24") -> str:
    return f"HGMMA.64x128x16.F32.BF16 {accumulator}, gdesc[UR{register}], {accumulator}"


def test_steps_are_followed_through_copies_and_sums_and_may_come_in_any_order():
    code = [
        "ULOP3.LUT UR6, UR15, 0x3fff0, URZ, 0xc0, !UPT",
        "UMOV UR8, UR24",
        "UIADD3.64 UR28, UR6, 0x2, URZ",  # A of the second step
        "UIADD3.64 UR30, UR8, 0x4, URZ",  # B of the second step
        product(28),
        product(6),
        "UIADD3 UR32, UR28, 0x2, URZ",
        "UIADD3.64 UR34, UR30, 0x4, URZ",
        product(32),
    ]
    assert descriptors.steps(code) == [[0, 32, 64], [0, 64, 128]]


def test_what_is_no_sum_is_not_judged():
    code = [product(6), "R2UR UR6, R3", product(6), "@UP0 UIADD3.64 UR8, UR8, 0x2, URZ", product(6)]
    assert descriptors.steps(code) == [None, None]


def test_a_is_no_descriptor_if_it_lies_in_registers():
    code = []
    for step in range(3):
        code += [f"UIADD3.64 UR18, UR26, {0x80 * step:#x}, URZ"]
        code += [f"HGMMA.64x64x16.F32.BF16 R88, R{120 + 4 * step}, gdesc[UR16].tnspB, R88"]
    assert descriptors.steps(code) == [[0, 2048, 4096]]


def test_a_missing_commit_before_a_wait_for_all_leaves_the_same_machine_code(tmp_path: Path):
    """As the lesson of chapter 6 says, so that no check of machine code can see it."""
    host = load_file(chapter(6).solution / "attention.py")
    source = (chapter(6).solution / "attention.cu").read_text()
    assert source.count("    wgmma_commit();\n") == 2
    (tmp_path / "attention.py").write_text((chapter(6).solution / "attention.py").read_text())
    (tmp_path / "attention.cu").write_text(source.replace("    wgmma_commit();\n", ""))
    for head_dim in (64, 128):
        cubins = [
            module.machine_code(head_dim, torch.bfloat16, False)[0]
            for module in (host, load_file(tmp_path / "attention.py"))
        ]
        first, second = (sass_instructions(bytes(cubin.tolist())) for cubin in cubins)
        assert first == second
