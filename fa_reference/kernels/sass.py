"""The machine instructions (SASS) of a compiled kernel: the proof that an intended instruction is really there."""

import collections
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from fa_reference.kernels.errors import KernelUnavailable

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", re.MULTILINE)
_OPCODE = re.compile(r"^(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")


@cache
def disassembler() -> str:
    """Path of nvdisasm or cuobjdump: from the PATH, the NVIDIA wheels or triton's. KernelUnavailable without any."""
    site = Path(sysconfig.get_paths()["purelib"])
    for name in ("nvdisasm", "cuobjdump"):
        places = [
            *site.glob(f"nvidia/*/bin/{name}"),
            site / "triton" / "backends" / "nvidia" / "bin" / name,
            Path(shutil.which(name) or f"/usr/local/cuda/bin/{name}"),
        ]
        for place in places:
            if os.access(place, os.X_OK):
                return str(place)
    raise KernelUnavailable(
        "reading SASS needs nvdisasm or cuobjdump; install the package nvidia-cuda-nvdisasm (make setup does)"
    )


@cache
def sass_listing(cubin: bytes) -> str:
    """The disassembly of a cubin, as the tool prints it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = disassembler()
        command = [tool, "-c", "-ndf"] if tool.endswith("nvdisasm") else [tool, "--dump-sass"]
        done = subprocess.run([*command, file.name], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise KernelUnavailable(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


def sass_instructions(cubin: bytes) -> list[str]:
    """All instructions in program order, as text without addresses."""
    return _INSTRUCTION.findall(sass_listing(cubin))


def opcode(instruction: str) -> str:
    """The opcode with its modifiers, such as HGMMA.64x128x16.F32.BF16, without the predicate."""
    found = _OPCODE.match(instruction)
    return found[1] if found else ""


def count_instructions(cubin: bytes) -> collections.Counter[str]:
    """How often each opcode stands in the code (not how often it runs), modifiers cut off.

    Without those under the predicate that is never true (@!PT): they do nothing, the compiler fills gaps with them.
    """
    lines = (line for line in sass_instructions(cubin) if not line.startswith("@!PT "))
    return collections.Counter(opcode(line).split(".")[0] for line in lines)


def instructions_between(cubin: bytes, first: str, unwanted: tuple[str, ...]) -> list[str]:
    """Instructions with an `unwanted` opcode between two neighbouring `first` ones that no branch separates.

    For `first` = HGMMA and unwanted = R2UR, WARPSYNC: signs that the compiler lost track of warp-uniform values.
    """
    found: list[str] = []
    pending: list[str] = []
    inside = False
    for line in sass_instructions(cubin):
        name = opcode(line).split(".")[0]
        if name == first:
            found += pending
            pending, inside = [], True
        elif name in ("BRA", "WARPGROUP", "BAR", "EXIT"):
            pending, inside = [], False
        elif inside and name in unwanted:
            pending.append(line)
    return found
