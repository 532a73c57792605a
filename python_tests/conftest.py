"""What every test runs under: no network, GPU kernels on the CPU, and memory that shows when it was not written."""

import ctypes
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import emulation
import pytest
import torch

if not torch.cuda.is_available():  # GPU kernels run on the CPU; before any kernel module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "PEFT_KERNELS_EMULATED" not in os.environ and (library := emulation.kernels()):
        os.environ["PEFT_KERNELS_EMULATED"] = str(library)

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    patched, patch = set(), interpreter._patch_lang

    def patch_once(fn):
        """Triton's patch of its language for one kernel; its device functions, which need no other, do not redo it."""
        languages = {id(interpreter.tl), id(interpreter.tl.core)} & {id(value) for value in fn.__globals__.values()}
        if languages <= patched:
            return interpreter._LangPatchScope()
        scope, new = patch(fn), languages - patched
        patched.update(new)
        restore = scope.restore
        scope.restore = lambda: (restore(), patched.difference_update(new))
        return scope

    interpreter._patch_lang = patch_once

# What torch.empty gives is NaN, and so is what C++ allocates, by glibc's M_PERTURB: an output that a kernel leaves
# unwritten fails its law.
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-6, 0x100)  # fills with the complement of the low byte
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.set_num_threads(1)  # the runner starts one worker per core


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny saved BERT with a tokenizer, for the command line."""
    from texts import bert

    return bert(tmp_path_factory.mktemp("model"))


@pytest.fixture
def undrawn(monkeypatch):
    """No picture of a run: it takes longer than everything else."""
    from peft_kernels import report

    monkeypatch.setattr(report, "draw", lambda path, log, summary: path.touch())


def pytest_collection_modifyitems(items):
    """Without a GPU the tests that need one do not run, and say so."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
