// The int8 linear layer on CUDA, without torch: plain device pointers and a stream. It gives the same bits as the
// CPU (kernels/kernels.h): exact int32 sums, then the same floating-point steps.
#pragma once

#include <cuda_runtime.h>

#include "../kernels/kernels.h"

namespace owlet::cuda {

inline __host__ __device__ int64_t k_tiles(int64_t K) { return ceil_div(K, kTileK); }

using Linear = LinearOf<int8_t>;

struct Tokens {
  const float* x;  // (count, K)
  int64_t count;
  const float* norm = nullptr;  // (K) to multiply RMSNorm(x) instead of x, or null
  float eps = 0;
};

// Memory for quantized tokens, not filled.
struct Scratch {
  int8_t* q;     // scratch_bytes(tokens, K), aligned to 16 bytes
  float* scale;  // (tokens)
};

inline int64_t scratch_bytes(int64_t tokens, int64_t K) { return ceil_div(tokens, 16) * 16 * k_tiles(K) * kTileK; }

// y (tokens, columns) = activation(x w.T) + residual. residual has y's shape, may be y itself, and may be null.
// 1 <= K <= kMaxK.
cudaError_t int8_linear(const Tokens& x, const Linear& linear, const float* residual, float* y, const Scratch& scratch,
                        cudaStream_t stream);

}  // namespace owlet::cuda
