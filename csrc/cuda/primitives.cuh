// The hardware instructions beyond CUDA C++: int8 tensor cores, asynchronous copies. Without nvcc, tests/cuda_emulator
// provides the same for tests on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace owlet::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

}  // namespace owlet::cuda

#ifndef __CUDACC__
#include <emulated_primitives.h>
#else

namespace owlet::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Arguments... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

// A warp computes c += a b: a int8 (16, 32), b int8 (32, 8), c int32 (16, 8). With g = lane / 4 and t = lane % 4, each
// register holds 4 k of a row of a or of a column of b:
//   a: rows g, g + 8 at k = 4t, then the same at k = 16 + 4t      b: column g at k = 4t, 16 + 4t
//   c: row g at columns 2t, 2t + 1, then row g + 8 at the same
__device__ __forceinline__ void mma(int (&c)[4], int a0, int a1, int a2, int a3, int b0, int b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750  // the same in four products of 8 rows and 16 k
  const auto quarter = [](int& c0, int& c1, int a, int b) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(c0), "+r"(c1)
                 : "r"(a), "r"(b));
  };
  quarter(c[0], c[1], a0, b0);
  quarter(c[0], c[1], a2, b1);
  quarter(c[2], c[3], a1, b0);
  quarter(c[2], c[3], a3, b1);
#else  // no int8 tensor cores
  __trap();
#endif
}

// Loads 16 bytes that are read once per token, so they are not kept in the L1 cache.
__device__ __forceinline__ int4 load_weights(const int8_t* p) {
  int4 v;
  asm("ld.global.nc.L1::no_allocate.v4.s32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Copies 16 bytes from global to shared memory. They have arrived after the wait for their group; on Turing at once.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  *static_cast<int4*>(shared) = *static_cast<const int4*>(global);
#endif
}

__device__ __forceinline__ void end_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are in flight.
template <int pending>
__device__ __forceinline__ void wait_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace owlet::cuda

#endif
