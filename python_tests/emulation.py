"""Builds CUDA C++ for the CPU (csrc/emulate) with the host compiler alone, into build/emulated.

EMULATED_FLAGS: more options for the compiler and the linker, such as -fsanitize=address.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC, OUT = ROOT / "csrc", ROOT / "build/emulated"
CPU_ALONE = "_(cpu|baseline|avx2|avx512|avx512_bf16|amx)$"  # names of sources that are no glue: cmake/op.cmake
CHECKS = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"  # their handlers: cuda_runtime.h


def compiler() -> list[str]:
    named = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")
    return named.split()


def _torch() -> str:
    return importlib.util.find_spec("torch").submodule_search_locations[0]


def _flags(source: Path) -> list[str]:
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-DPK_EMULATE", "-DPK_WITH_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-ffp-contract=fast"]
    flags += [f"-I{CSRC}/emulate", f"-I{CSRC}", "-isystem", f"{_torch()}/include", f"-ffile-prefix-map={CSRC}/="]
    # Asking for the checks when compiling only, so that no sanitizer's runtime is linked.
    return (
        flags
        + ([f"-fsanitize={CHECKS}"] if source.suffix == ".cu" else [])
        + os.environ.get("EMULATED_FLAGS", "").split()
    )


def _object(source: Path) -> Path:
    command = [*compiler(), *_flags(source)]
    headers = [path for pattern in ("*.h", "*.cuh") for path in sorted(CSRC.rglob(pattern))]
    key = hashlib.sha256(" ".join(command).encode())
    for path in (*headers, source):
        key.update(path.read_bytes())
    out = OUT / f"{source.stem}-{key.hexdigest()[:16]}.o"
    if not out.exists():
        part = out.with_suffix(".part")
        done = subprocess.run([*command, "-x", "c++", "-c", source, "-o", part], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source}: not compiled for the CPU\n{done.stderr}")
        part.rename(out)
    return out


def build(sources: list[Path]) -> Path | None:
    """A shared library of `sources`, .cu as C++. None if there is no compiler."""
    if not compiler():
        return None
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "lock", "w") as lock:  # the workers of one test run ask at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(_object, sources))
        out = OUT / f"lib{hashlib.sha256(' '.join(map(str, objects)).encode()).hexdigest()[:16]}.so"
        if not out.exists():
            part = out.with_suffix(".part")
            extra = os.environ.get("EMULATED_FLAGS", "").split()
            torch = [f"-L{_torch()}/lib", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
            subprocess.run([*compiler(), *extra, "-shared", *objects, *torch, "-o", part], check=True)
            part.rename(out)
    return out


def kernels() -> Path | None:
    """The library of every op that has CUDA kernels."""
    launchers = sorted(CSRC.glob("*/*_cuda.cu"))
    glue = [path for folder in sorted({path.parent for path in launchers}) for path in sorted(folder.glob("*.cpp"))]
    glue = [path for path in glue if not re.search(CPU_ALONE, path.stem)]
    return build([*launchers, *glue])
