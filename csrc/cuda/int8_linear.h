// The int8 linear layer on CUDA, free of torch: plain device pointers and a stream. Same arithmetic as on the CPU
// (kernels/kernels.h), to the last bit in fp32: exact int32 sums, then the same steps of floating point.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels/kernels.h"
#include "layout.h"

namespace owlet::cuda {

inline __host__ __device__ int64_t k_tiles(int64_t K) { return (K + kTileK - 1) / kTileK; }

struct Linear {
  int64_t N, K;
  const int8_t* packed;
  const float* scale;  // (N)
  const float* bias;   // (N) or null
  // swiglu: channels alternate gate and up, and y has N / 2 columns: silu(gate) * up.
  Activation activation;

  __host__ __device__ int64_t columns() const { return activation == Activation::swiglu ? N / 2 : N; }
};

// T: float, __half or __nv_bfloat16.
template <typename T>
struct Tokens {
  const T* x;  // (count, K)
  int64_t count;
  const float* norm = nullptr;  // (K): multiply RMSNorm(x) instead of x. Or null
  float eps = 0;
};

// For quantized tokens, not filled.
struct Scratch {
  int8_t* q;     // scratch_bytes(tokens, K), at a multiple of 16 bytes
  float* scale;  // (tokens)
};

inline int64_t scratch_bytes(int64_t tokens, int64_t K) { return (tokens + 15) / 16 * 16 * k_tiles(K) * kTileK; }

// y (tokens, columns) of T = activation(x w.T + bias) + residual. residual has y's shape, may be y itself, and may
// be null. 1 <= K <= kMaxK.
template <typename T>
cudaError_t int8_linear(const Tokens<T>& x, const Linear& linear, const T* residual, T* y, const Scratch& scratch,
                        cudaStream_t stream);

}  // namespace owlet::cuda
