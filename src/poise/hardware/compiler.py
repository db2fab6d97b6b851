"""Whether ``torch.compile`` has the compilers that it needs, without finding out in the middle of a run."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig

import torch

_PROGRAM = "#include <Python.h>\n#include <vector>\nint main() { std::vector<float> x(3); return 0; }\n"


def can_compile(device: torch.device | str = "cpu") -> tuple[bool, str]:
    """Return whether compiling can work, and one line that says why (not).

    On a CPU inductor needs a C++ compiler that finds the standard library and Python's headers; on a GPU
    triton, a GPU of compute capability 7.0 or more, and a C compiler. Takes about half a second, once.
    """
    return _can_compile(torch.device(device).type, os.environ.get("CXX"), os.environ.get("CC"))


@functools.cache
def _can_compile(device_type: str, cxx: str | None, cc: str | None) -> tuple[bool, str]:
    if device_type == "cuda":
        return _gpu(cc)
    compiler = next((c for c in (cxx, "g++", "clang++", "c++") if c and shutil.which(c)), None)
    if compiler is None:
        return False, "no C++ compiler found; install g++ (or set CXX), or train with compile=off"
    command = [compiler, "-x", "c++", "-std=c++17", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-"]
    program = _PROGRAM
    if sys.platform == "linux":  # elsewhere inductor looks for OpenMP in its own ways
        command.insert(1, "-fopenmp")
        program = "#include <omp.h>\n" + program
    try:
        done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"the C++ compiler '{compiler}' does not run: {type(error).__name__}"
    if done.returncode:
        if "Python.h" in done.stderr:
            return False, "Python's headers are missing; install python3-dev, or train with compile=off"
        fault = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
        return False, f"the C++ compiler '{compiler}' does not work: {fault.strip()[:120]}"
    return True, f"C++ compiler '{compiler}' works"


def _gpu(cc: str | None) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; install it, or train with compile=off"
    if not torch.cuda.is_available():
        return False, "no CUDA device is available"
    if torch.cuda.get_device_capability() < (7, 0):
        return False, f"{torch.cuda.get_device_name()} is older than triton supports; train with compile=off"
    if not any(c and shutil.which(c) for c in (cc, "gcc", "clang", "cc")):
        return False, "no C compiler found, which triton needs; install gcc, or train with compile=off"
    return True, "triton and a C compiler are there"
