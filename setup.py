"""Packages by glob, binaries by CMake (csrc/CMakeLists.txt).

PEFT_KERNELS_BUILD: auto (CUDA if torch and nvcc have it, nothing if there is no compiler), cuda, cpu or none.
PEFT_KERNELS_LOCAL_VERSION: what follows `+` in the version (default cpu or cu130; `none` where an index refuses it).
Also read: TORCH_CUDA_ARCH_LIST, CXX, CUDACXX, CUDA_HOME, MAX_JOBS, NVCC_THREADS, CMAKE_ARGS, DEBUG.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
KERNELS = "peft_kernels.kernels"
OPS_LIBRARY = "libpeft_kernels_ops.so"
VERSION = runpy.run_path(str(ROOT / "peft_kernels/_version.py"))["__version__"]
INSTALL = 'pip install torch "setuptools>=77" cmake ninja pybind11 && pip install --no-build-isolation .'


def tool(name, *fallbacks):
    """A program on PATH, beside this Python (a virtual environment that is not activated), or at a usual place."""
    return shutil.which(name) or shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), *fallbacks])
    )


def package_dir(name):
    """Where a package is, without importing it: a CUDA torch need not even be importable on a build machine."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def nvcc_found():
    """(path, version) of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX") or (home and f"{home}/bin/nvcc") or tool("nvcc", "/usr/local/cuda/bin")
    if not named or not shutil.which(named):
        return None
    said = subprocess.run([named, "--version"], capture_output=True, text=True, check=True).stdout
    return named, re.search(r"release (\d+\.\d+)", said)[1]


class Plan:
    """What to build: `kind` is none, cpu or cuda. Every refusal and every warning is one line that says what to do."""

    def __init__(self):
        wish = os.environ.get("PEFT_KERNELS_BUILD") or "auto"
        if wish not in ("auto", "cuda", "cpu", "none"):
            sys.exit(f"PEFT_KERNELS_BUILD={wish}: choose auto, cuda, cpu or none")
        self.kind, self.torch, self.nvcc = "none", package_dir("torch"), None
        if {"sdist", "egg_info"} & set(sys.argv):  # a source distribution fits every torch, and none is needed for it
            return
        if wish == "none":
            return self.warn(
                "PEFT_KERNELS_BUILD=none: installing without compiled kernels; unset it and reinstall to build"
            )
        if self.torch is None:
            sys.exit(f"the build needs the torch you will run with: {INSTALL}   (PEFT_KERNELS_BUILD=none skips it)")
        if not any(tool(name) for name in (os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"])):
            why = "no C++ compiler found (install g++ >= 11 or clang++ >= 12, or set CXX)"
            if wish != "auto":
                sys.exit(f"PEFT_KERNELS_BUILD={wish}: {why}")
            return self.warn(f"{why}: installing without compiled kernels; install one and reinstall")
        facts = runpy.run_path(str(self.torch / "version.py"))
        self.torch_version, self.cuda = facts["__version__"], facts.get("cuda")
        if wish == "cuda" and not self.cuda:
            sys.exit(
                f"PEFT_KERNELS_BUILD=cuda but torch {self.torch_version} is CPU-only: install a CUDA build of torch"
            )
        self.kind = "cpu"
        if wish == "cpu" or not self.cuda:
            return
        self.nvcc = nvcc_found()
        if self.nvcc and self.nvcc[1].split(".")[0] == self.cuda.split(".")[0]:
            self.kind = "cuda"
        elif self.nvcc:
            sys.exit(
                f"nvcc is CUDA {self.nvcc[1]} but torch {self.torch_version} is CUDA {self.cuda}: set CUDA_HOME to a "
                f"toolkit of CUDA {self.cuda.split('.')[0]}, install a torch for CUDA {self.nvcc[1].split('.')[0]}, "
                "or set PEFT_KERNELS_BUILD=cpu"
            )
        elif wish == "cuda":
            sys.exit(f"PEFT_KERNELS_BUILD=cuda but nvcc was not found: install CUDA {self.cuda} and set CUDA_HOME")
        else:
            self.warn(
                f"no nvcc for CUDA {self.cuda}: building the CPU kernels only; set CUDA_HOME and reinstall for CUDA"
            )

    @staticmethod
    def warn(line):
        print(f"peft-kernels: WARNING: {line}", file=sys.stderr)

    @property
    def local_version(self):
        if self.kind == "none":
            return ""
        built = "cpu" if self.kind == "cpu" else "cu" + self.cuda.replace(".", "")
        local = os.environ.get("PEFT_KERNELS_LOCAL_VERSION") or built
        return "" if local == "none" else f"+{local}"

    @property
    def cuda_archs(self):
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
        newest = tuple(map(int, self.nvcc[1].split("."))) >= (12, 8)  # the first nvcc that knows sm_100 and sm_120
        return listed or ("8.0;8.6;8.9;9.0a;10.0;12.0+PTX" if newest else "8.0;8.6;8.9;9.0+PTX")


class CMakeBuild(build_ext):
    """Builds _C and the ops library in build/cmake/<key>, which is kept, and copies both out of it."""

    def build_extension(self, ext):
        cmake, ninja, pybind11 = tool("cmake"), tool("ninja"), package_dir("pybind11")
        if not cmake:
            sys.exit(f"the build needs cmake: {INSTALL}")
        key = f"cp{sys.version_info[0]}{sys.version_info[1]}-torch{PLAN.torch_version}-{PLAN.kind}"
        build = ROOT / "build/cmake" / (key + (PLAN.nvcc[1] if PLAN.kind == "cuda" else ""))
        facts = {
            "CMAKE_BUILD_TYPE": "RelWithDebInfo" if os.environ.get("DEBUG") else "Release",
            "Python_EXECUTABLE": sys.executable,
            "PK_VERSION": VERSION,
            "PK_TORCH_DIR": PLAN.torch,
            "PK_TORCH_VERSION": PLAN.torch_version,
            "PK_PYBIND11_INCLUDE": (pybind11 or PLAN.torch) / "include",  # torch carries a copy
        }
        if PLAN.kind == "cuda":
            threads = os.environ.get("NVCC_THREADS", "2")
            facts |= {"PK_CUDA_ARCHS": PLAN.cuda_archs, "CMAKE_CUDA_COMPILER": PLAN.nvcc[0]}
            facts |= {"CMAKE_CUDA_FLAGS": f"--threads={threads}"}
        if ninja:
            facts |= {"CMAKE_MAKE_PROGRAM": ninja}  # an isolated build's own ninja is gone the next time
        if cache := tool("ccache") or tool("sccache"):
            facts |= {"CMAKE_CXX_COMPILER_LAUNCHER": cache, "CMAKE_CUDA_COMPILER_LAUNCHER": cache}
        generator = ["-G", "Ninja" if ninja else "Unix Makefiles"]
        defines = [f"-D{name}={value}" for name, value in facts.items()]
        user = os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run([cmake, "-S", ROOT / "csrc", "-B", build, *generator, *defines, *user], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)
        shutil.copy2(build / OPS_LIBRARY, target.parent)

    # setuptools knows of _C alone; the three methods below add the ops library beside it.
    def _ops_library(self):
        build_py = self.get_finalized_command("build_py")
        return {
            str(Path(self.build_lib, "peft_kernels", OPS_LIBRARY)): str(
                Path(build_py.get_package_dir("peft_kernels"), OPS_LIBRARY)
            )
        }

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        for built, source in self._ops_library().items():
            self.copy_file(built, source)

    def get_outputs(self):
        return [*super().get_outputs(), *(self._ops_library() if self.extensions else ())]

    def get_output_mapping(self):
        return super().get_output_mapping() | (self._ops_library() if self.extensions and self.inplace else {})


PLAN = Plan()
setup(
    version=VERSION + PLAN.local_version,
    packages=[
        *find_packages(include=["peft_kernels", "peft_kernels.*"]),
        KERNELS,
        *(f"{KERNELS}.{init.parent.name}" for init in sorted(ROOT.glob("csrc/*/__init__.py"))),
    ],
    package_dir={KERNELS: "csrc"},
    package_data={"peft_kernels": ["py.typed"]},
    include_package_data=False,  # or every source of csrc would land in the wheel
    ext_modules=[] if PLAN.kind == "none" else [Extension("peft_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
