"""Build the int8 kernels into the module owlet_kernels, next to this file:

    python setup.py build_ext

One build runs on any CPU of its architecture: instruction sets are chosen at run time. The CUDA
kernels join when torch is a CUDA build and nvcc is found.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

if not shutil.which(os.environ.get("CXX", "c++")):
    sys.exit("setup.py: no C++ compiler found; install g++ or clang++, or name yours in CXX")

csrc = Path("csrc")
sources = {*csrc.glob("*.cpp"), *csrc.glob("kernels/*.cpp")} - {csrc / "kernels/selftest.cpp"}

# Without contraction to fused multiply-adds, every instruction set gives the same floats.
cxx_flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math"]
if sys.platform == "linux":
    # at::parallel_for is a template: without OpenMP here, it runs on one thread. Not linked with
    # -fopenmp, so that the calls resolve to the runtime torch brought, not to a second one.
    cxx_flags.append("-fopenmp")

if torch.version.cuda and CUDA_HOME and (Path(CUDA_HOME) / "bin/nvcc").exists():
    extension = CUDAExtension
    sources |= {*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cpp")}
    cxx_flags.append("-DOWLET_CUDA")
    if not torch.cuda.is_available():  # else torch compiles for the GPUs that are here
        newest = "9.0;10.0+PTX" if torch.version.cuda >= "12.8" else "9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"7.5;8.0;8.6;8.9;{newest}")
else:
    extension = CppExtension

setup(
    name="owlet_kernels",
    ext_modules=[
        extension(
            "owlet_kernels",
            sorted(map(str, sources)),
            extra_compile_args={"cxx": cxx_flags, "nvcc": ["-O3", "-fmad=false"]},
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
