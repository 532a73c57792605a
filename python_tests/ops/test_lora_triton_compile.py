"""The Triton LoRA kernels compile for real GPUs, on a machine that has none.

A child process, where Triton does not interpret, runs the two primitives on CPU tensors under a driver that only names
a target: each launch compiles exactly what a GPU of that target would run, down to the cubin, and stops there.
"""

import json
import os
import re
import subprocess
import sys

import pytest

SMEM = 99 * 1024  # the most a block may have on sm_86 and sm_89, the smallest of the GPUs served

# id: x's dtype, the adapter's dtype, M, K, N, r. Dropout is in x's kernels and not in g's, so one p compiles both.
CASES = {
    "fp32": ("float32", "float32", 512, 1024, 1024, 16),
    "bf16": ("bfloat16", "bfloat16", 512, 1024, 1024, 16),
    "mixed_fp16": ("float16", "float32", 512, 1024, 1024, 16),
    "wide_rank": ("bfloat16", "float32", 512, 1024, 1024, 200),
    "odd_decode": ("bfloat16", "bfloat16", 1, 100, 51, 3),
}
MARKS = {"mma": r"mma\.sync|wgmma", "tf32": "tf32", "atomic": r"\b(atom|red)\.", "pipelined": r"cp\.async"}
BY_PLAN = "_by_plan"  # follows the id where rows go by a plan
KERNELS = {"lora_shrink_kernel", "lora_expand_kernel", "lora_wgrad_kernel"}


def compile_cases(capability: int) -> None:
    """One JSON line per compiled kernel: case, kernel, shared memory and what its PTX holds."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from peft_kernels.kernels.lora import lora_triton
    from peft_kernels.kernels.lora.plan import plan

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    compiled = []
    launch = JITFunction.run

    def run(kernel, *args, grid, warmup, **options):
        compiled.append((kernel.__name__, launch(kernel, *args, grid=grid, warmup=True, **options)))

    def report(case):
        for name, kernel in compiled:
            ptx = kernel.asm["ptx"]
            found = [mark for mark, pattern in MARKS.items() if re.search(pattern, ptx)]
            ok = bool(kernel.asm["cubin"]) and f".target sm_{capability}" in ptx
            print(json.dumps((case, name, ok, kernel.metadata.shared, found)))
        compiled.clear()

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = run
    for case, (low, high, m, k, n, r) in CASES.items():
        low, high = getattr(torch, low), getattr(torch, high)
        x, y = torch.empty(m, k, dtype=low), torch.empty(m, n, dtype=low)
        a, b = torch.empty(r, k, dtype=high), torch.empty(n, r, dtype=high)
        rng = torch.tensor([1, 2])
        t = lora_triton.add_(y, x, a, b, 2.0, 0.1, rng)
        lora_triton.backward_(torch.empty_like(x), y, x, a, b, t, 2.0, 0.1, rng, True, True)
        report(case)
        ids = torch.arange(m, dtype=torch.int32) % 4
        bank = (
            torch.empty(4 * r, k, dtype=high),
            torch.empty(4 * r, n, dtype=high),
            torch.arange(5) * r,
            torch.ones(4),
        )
        block_m = 16 if case in ("wide_rank", "odd_decode") else 64
        args = (x, *bank, ids, plan(ids, bank[2], block_m), r, 0.1, rng)
        lora_triton.multi_add_(y, *args)
        lora_triton.multi_backward_(torch.empty_like(x), y, *args, True, True)
        if case == "bf16":
            lora_triton.apply_(y, x, bank[0].repeat(2, 1), *args[2:-2], [n // 2, n // 2])
        report(case + BY_PLAN)


@pytest.mark.parametrize("capability", (80, 90))
def test_compiles_for(capability, tmp_path):
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    child = subprocess.run([sys.executable, __file__, str(capability)], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    compiled = [json.loads(line) for line in child.stdout.splitlines()]
    for case in CASES:
        for suffix in ("", BY_PLAN):
            assert {name for at, name, *_ in compiled if at == case + suffix} >= KERNELS, case + suffix
    for case, name, ok, shared, found in compiled:
        case, where = case.removesuffix(BY_PLAN), f"{case} {name}: {shared} bytes of shared memory, {found}"
        assert ok and shared <= SMEM, where
        assert not {"tf32", "atomic"} & set(found), where  # fp32 stays fp32, runs stay bit-identical
        if name in KERNELS:
            assert ("mma" in found) == (case != "fp32"), where
        if name in ("lora_shrink_kernel", "lora_wgrad_kernel") and case != "odd_decode":
            assert "pipelined" in found, where  # loads are pipelined, which needs them to be vectors


if __name__ == "__main__":
    compile_cases(int(sys.argv[1]))
