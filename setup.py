"""Build the int8 kernels into the module owlet_kernels, next to this file:

    python setup.py build_ext

One build runs on any CPU of its architecture, because the instruction set is chosen at run time. The CUDA kernels are
built too when torch is a CUDA build and an nvcc is found; CUDA_HOME=none leaves them out.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

words = shlex.split(os.environ.get("CXX") or "c++")
cxx_flags = [word for word in words if word.startswith("-")]
cxx = os.environ["CXX"] = [word for word in words if word not in cxx_flags][-1]  # torch takes one word, no "ccache g++"
if not shutil.which(cxx):
    sys.exit("setup.py: no C++ compiler found; install g++ or clang++, or name yours in CXX")

csrc = Path("csrc")
sources = [*csrc.glob("*.cpp"), *csrc.glob("kernels/*.cpp")]

# Without contraction to fused multiply-adds, every instruction set gives the same floats.
cxx_flags += ["-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math"]
is_gcc = "Free Software Foundation" in subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
if sys.platform == "linux" and not is_gcc:
    print(f"setup.py: torch brings GCC's OpenMP, not that of {cxx}: products outside the decoder use one thread")
elif sys.platform == "linux":
    # at::parallel_for is a template: compiled without OpenMP, it uses one thread. Linking without -fopenmp makes the
    # calls resolve to the OpenMP runtime that torch brings, not to a second one.
    cxx_flags.append("-fopenmp")

# GPUs older than Turing have no int8 tensor cores. CUDA_HOME is None where torch is built without CUDA.
nvcc = Path(CUDA_HOME or "", "bin/nvcc")
found = nvcc.exists() and (nvcc.parents[1] / "include/cuda_runtime.h").exists()  # not beside a link to nvcc
release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if found else ""
too_old = any(torch.cuda.get_device_capability(i) < (7, 5) for i in range(torch.cuda.device_count()))
if f"release {str(torch.version.cuda).split('.')[0]}." not in release or too_old:
    print("setup.py: no CUDA kernels: they need torch for CUDA, its nvcc in CUDA_HOME, no older GPU than Turing")
    extension = CppExtension
else:
    extension = CUDAExtension
    sources += [*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cpp")]
    cxx_flags.append("-DOWLET_CUDA")
    if not torch.cuda.is_available():  # with a GPU here, torch compiles for it
        newest = ";10.0+PTX" if int(torch.version.cuda.split(".")[0]) >= 13 else "+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"7.5;8.0;8.6;8.9;9.0{newest}")

compile_args = {"cxx": cxx_flags, "nvcc": ["-O3", "-fmad=false"]}
try:
    setup(
        name="owlet_kernels",
        ext_modules=[extension("owlet_kernels", sorted(map(str, sources)), extra_compile_args=compile_args)],
        cmdclass={"build_ext": BuildExtension},
        options={"build_ext": {"inplace": True}},
    )
except (Exception, SystemExit):
    if extension is CUDAExtension:
        print("setup.py: to build without CUDA kernels: CUDA_HOME=none python setup.py build_ext", file=sys.stderr)
    raise
