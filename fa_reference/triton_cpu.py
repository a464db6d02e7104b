"""Triton with or without a GPU: kernels of the course say `from fa_reference.triton_cpu import triton, tl`.

With a GPU this is plain Triton. Without one the import does two things:

1. It sets TRITON_INTERPRET=1 before Triton is imported, so that kernels run on CPU tensors in Triton's interpreter: one
   program after the other, in numpy. Set TRITON_INTERPRET yourself (0 or 1) and that choice is kept.
2. It repairs the interpreter where it is wrong (seen with triton 3.6; tests/course/test_triton.py shows each case):
   - bf16 values are held as raw 16-bit integers, and dot products and elementwise operations worked on those integers;
   - the conversion from fp32 to bf16 cut the mantissa off, where a GPU rounds to the nearest value (ties to even);
   - numpy >= 2.4 refuses int(array of shape (1,)), which is how the interpreter reads the bounds of a loop;
   - `@triton.autotune` looked for a GPU to time its configurations on: here the first one is taken.

`compile_forward` compiles the kernels that a file launches for a GPU that need not be there, and returns the assembly.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise ImportError(
            "Triton was imported before fa_reference.triton_cpu, too early to choose its interpreter, and there is no "
            "GPU: import fa_reference.triton_cpu first, or start Python with TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402  (the interpreter is chosen when Triton is imported)
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

__all__ = ["DEVICES", "HAS_GPU", "INTERPRETED", "TARGETS", "CompiledKernel", "TensorDescriptor"]
__all__ += ["compile_forward", "on_device_of", "tl", "triton"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
DEVICES: tuple[str, ...] = ("cuda",) if HAS_GPU and not INTERPRETED else ("cpu",)
"""Where the tensors of a Triton kernel must live in this process (AMD GPUs are called "cuda" by torch, too)."""

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
"""Names of `compile_forward`'s targets: NVIDIA A100, NVIDIA H100 and H200, AMD MI300X."""


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which Triton launches on the tensor's GPU (it uses the current one otherwise); nothing on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# --- the interpreter's repairs ----------------------------------------------------------------------------------------


def _bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """bf16 is the upper half of fp32, so widening is a shift and loses nothing."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(values))


def _repair_interpreter() -> None:
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def widen(x: Any) -> Any:
        return handle(_bf16_to_fp32(x.data), tl.float32) if is_bf16(x) else x

    def narrow(x: Any) -> Any:
        return handle(_fp32_to_bf16(x.data), tl.bfloat16) if x.data.dtype == np.float32 else x  # comparisons give bool

    def in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
        """Do an operation on bf16 operands in fp32, then round its result to bf16."""

        @functools.wraps(method)
        def repaired(self: Any, *operands: Any) -> Any:
            if not any(is_bf16(x) for x in operands):
                return method(self, *operands)
            return narrow(method(self, *(widen(x) for x in operands)))

        return repaired

    for name in ("binary_op", "unary_op", "create_clampf", "create_fma", "create_erf", "create_rsqrt"):
        setattr(builder, name, in_fp32(getattr(builder, name)))

    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        return dot(self, widen(a), widen(b), acc, *options)

    def convert(method: Callable[..., Any]) -> Callable[..., Any]:
        """A conversion from or to bf16 goes through fp32."""

        @functools.wraps(method)
        def repaired(self: Any, source: Any, target: Any, *options: Any) -> Any:
            if is_bf16(source):
                source = widen(source)
                if target.scalar == tl.float32:
                    return source
            if target.scalar == tl.bfloat16 and not (options and "TOWARDS_ZERO" in str(options[0]).upper()):
                return handle(_fp32_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
            if source.dtype.scalar == target.scalar:
                return source
            return method(self, source, target, *options)

        return repaired

    builder.create_dot = create_dot
    builder.cast_impl = convert(builder.cast_impl)
    builder.create_fp_to_fp = convert(builder.create_fp_to_fp)
    builder.get_bf16 = lambda self, value: handle(_fp32_to_bf16(np.array([value], np.float32)), tl.bfloat16)

    def retyped(tensor: Any, data: Any) -> Any:
        """The tensor with other data of the same shape; its element type is that of the data."""
        element = data.dtype.scalar
        kind = tl.block_type(element, tensor.type.shape) if tensor.type.is_block() else element
        return tl.core.tensor(data, kind)

    reduce_or_scan = interpreter.ReduceScanOpInterface.apply

    def apply(self: Any, operands: Any) -> Any:
        if not isinstance(operands, tuple) or not any(is_bf16(x.handle) for x in operands):
            return reduce_or_scan(self, operands)
        wide = tuple(retyped(x, widen(x.handle)) for x in operands)
        results = reduce_or_scan(self, wide)
        return tuple(
            retyped(r, narrow(r.handle)) if is_bf16(x.handle) else r for x, r in zip(operands, results, strict=True)
        )

    interpreter.ReduceScanOpInterface.apply = apply

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]  # all equal: the first configuration wins


if INTERPRETED:
    _repair_interpreter()


# --- compiling for a GPU that is not there ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as the compiler left it. `assembly` is PTX or AMD GCN text; registers and spilled bytes are per thread
    and None where the target's tools do not tell them; shared_bytes is per program."""

    name: str
    target: str
    assembly: str
    num_warps: int
    num_stages: int
    shared_bytes: int
    registers: int | None
    spilled_bytes: int | None

    def count(self, instruction: str) -> int:
        """How often an instruction (a regular expression) stands in the assembly."""
        return len(re.findall(instruction, self.assembly))


def compile_forward(
    file: str | Path,
    target: str,
    *,
    dtype: str = "bfloat16",
    head_dims: Sequence[int] = (64,),
    causal: Sequence[bool] = (False,),
    length: int = 1024,
    timeout_s: float = 120.0,
) -> list[CompiledKernel]:
    """Compile every Triton kernel that `forward` of `file` launches for `target`, a name in TARGETS; no GPU is needed.

    `forward` is called in a process of its own on small CPU tensors (batch 1, 2 query heads, 1 key head, `length`
    tokens), once per head_dim and causal setting; each kernel launch is compiled instead of run. Raises RuntimeError
    with the end of the process's output if that fails, TimeoutError after `timeout_s` seconds.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; allowed: {', '.join(TARGETS)}")
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        request = {"file": str(Path(file).resolve()), "target": target, "dtype": dtype, "length": length}
        request |= {"head_dims": list(head_dims), "causal": list(causal), "result": f"{folder}/result.json"}
        command = [sys.executable, "-m", "fa_reference.triton_cpu", json.dumps(request)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"compiling {file} for {target} took longer than {timeout_s:g} s") from error
        if done.returncode != 0:
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
            raise RuntimeError(f"{Path(file).name} does not compile for {target}:\n{tail}")
        return [CompiledKernel(**kernel) for kernel in json.loads(Path(request["result"]).read_text())]


def _resources(kernel: Any) -> tuple[int | None, int | None]:
    """Registers and spilled bytes per thread of an NVIDIA kernel, from the cuobjdump inside the Triton package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if "cubin" not in kernel.asm or not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    return (int(registers[1]) if registers else None), (int(stack[1]) if stack else None)


def _compile_in_this_process(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The child's side of `compile_forward`: a stand-in driver answers for the GPU, and launches only compile."""
    import importlib.util

    from triton.backends.compiler import GPUTarget
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    class StandInDriver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget(*TARGETS[request["target"]])

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    kernels: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels.setdefault(kernel.hash, kernel)
        return kernel

    triton.runtime.driver.set_active(StandInDriver())
    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    JITFunction.run = compile_only

    spec = importlib.util.spec_from_file_location(Path(request["file"]).stem, request["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for head_dim in request["head_dims"]:
        for causal in request["causal"]:
            q = torch.zeros(1, 2, request["length"], head_dim, dtype=getattr(torch, request["dtype"]))
            k, v = (torch.zeros(1, 1, request["length"], head_dim, dtype=q.dtype) for _ in range(2))
            module.forward(q, k, v, causal=causal)

    found = []
    for kernel in kernels.values():
        registers, spilled = _resources(kernel)
        assembly = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
        entry = {"name": kernel.name, "target": request["target"], "assembly": assembly}
        entry |= {"num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}
        entry |= {"shared_bytes": kernel.metadata.shared, "registers": registers, "spilled_bytes": spilled}
        found.append(entry)
    return found


if __name__ == "__main__":
    _request = json.loads(sys.argv[1])
    Path(_request["result"]).write_text(json.dumps(_compile_in_this_process(_request)))
