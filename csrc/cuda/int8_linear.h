// The int8 linear layer on CUDA, free of torch: plain device pointers and a stream. Same packed
// weights and same floats, to the last bit, as on the CPU (kernels/kernels.h says what each means).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels/kernels.h"

namespace owlet::cuda {

// x (tokens, K) -> q (tokens, K rounded up to a multiple of 4), scale (tokens).
cudaError_t quantize_tokens(const float* x, int64_t tokens, int64_t K, int8_t* q, float* scale,
                            cudaStream_t stream);

// y (tokens, N), or (tokens, N / 2) for swiglu. bias and residual may be null.
cudaError_t int8_linear(const int8_t* q, const float* x_scale, int64_t tokens, int64_t K,
                        const uint8_t* packed, int64_t N, const float* scale, const float* bias,
                        Activation activation, const float* residual, float* y,
                        cudaStream_t stream);

}  // namespace owlet::cuda
