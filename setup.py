"""Build the int8 kernels into the module owlet_kernels, next to this file:

    python setup.py build_ext

One build runs on any CPU of its architecture, because the instruction set is chosen at run time. The CUDA kernels are
built too when torch is a CUDA build and an nvcc of the same CUDA version is found.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

cxx = shlex.split(os.environ.get("CXX") or "c++")
if not shutil.which(cxx[0]):
    sys.exit("setup.py: no C++ compiler found; install g++ or clang++, or name yours in CXX")

csrc = Path("csrc")
sources = [*csrc.glob("*.cpp"), *csrc.glob("kernels/*.cpp")]

# Without contraction to fused multiply-adds, every instruction set gives the same floats.
cxx_flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math"]
is_gcc = "Free Software Foundation" in subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
if sys.platform == "linux" and not is_gcc:
    print(f"setup.py: torch brings GCC's OpenMP, not that of {cxx[-1]}: products outside the decoder use one thread")
elif sys.platform == "linux":
    # at::parallel_for is a template: compiled without OpenMP, it uses one thread. Linking without -fopenmp makes the
    # calls resolve to the OpenMP runtime that torch brings, not to a second one.
    cxx_flags.append("-fopenmp")


def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here; None if they can."""
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    nvcc = Path(CUDA_HOME or "") / "bin/nvcc"
    if not nvcc.exists():
        return "no nvcc found"
    version = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {version and version[1]}, torch of {torch.version.cuda}"
    if any(torch.cuda.get_device_capability(i) < (7, 5) for i in range(torch.cuda.device_count())):
        return "there is a GPU older than Turing"  # it has no int8 tensor cores
    headers = [f"-I{path}" for path in include_paths("cuda")]
    for compiler, ending in ([nvcc], "cu"), (cxx, "cpp"):  # the toolkit's headers may be missing for one or both
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder, f"trial.{ending}")
            trial.write_text("#include <c10/cuda/CUDAGuard.h>\n")
            command = [*compiler, "-std=c++20", "-c", trial, "-o", f"{trial}.o", *headers]
            tried = subprocess.run(command, capture_output=True, text=True)
        if tried.returncode:
            errors = [line for line in tried.stderr.splitlines() if "error" in line]
            return f"{compiler[-1]} compiles none ({errors[0] if errors else tried.returncode}); set CUDA_HOME"
    return None


if why_not := why_no_cuda():
    print(f"setup.py: no CUDA kernels: {why_not}")
    extension = CppExtension
else:
    extension = CUDAExtension
    sources += [*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cpp")]
    cxx_flags.append("-DOWLET_CUDA")
    if not torch.cuda.is_available():  # with a GPU here, torch compiles for it
        newest = ";10.0+PTX" if int(torch.version.cuda.split(".")[0]) >= 13 else "+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"7.5;8.0;8.6;8.9;9.0{newest}")

compile_args = {"cxx": cxx_flags, "nvcc": ["-O3", "-fmad=false"]}
setup(
    name="owlet_kernels",
    ext_modules=[extension("owlet_kernels", sorted(map(str, sources)), extra_compile_args=compile_args)],
    cmdclass={"build_ext": BuildExtension},
    options={"build_ext": {"inplace": True}},
)
