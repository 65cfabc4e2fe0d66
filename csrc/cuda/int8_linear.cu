// Compile with -fmad=false: a fused multiply-add would round differently from the CPU.
#include "../kernels/numerics.h"
#include "int8_linear.h"

namespace owlet::cuda {
namespace {

constexpr int kTileTokens = 6;  // that a block takes at once, so that weights are loaded once for several
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

__host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One warp a token.
__global__ void quantize_kernel(const float* x, int64_t K, int8_t* q, float* scale) {
  const int64_t t = blockIdx.x, q_stride = ceil_div(K, 4) * 4;

  int amax = 0;
  for (int64_t k = threadIdx.x; k < K; k += kWarp) amax = max(amax, abs_bits(x[t * K + k]));
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    amax = max(amax, __shfl_xor_sync(kAllLanes, amax, mask));

  const TokenScale s = token_scale(amax);
  if (threadIdx.x == 0) scale[t] = s.scale;
  for (int64_t k = threadIdx.x; k < q_stride; k += kWarp)
    q[t * q_stride + k] = k < K && s.inverse > 0 ? round_to_int(x[t * K + k] * s.inverse) : 0;
}

// A block does one panel for kTileTokens tokens. A warp has 8 rows of the panel, each read by 4
// lanes that take every 4th quad of k: so a warp loads 4 whole sectors of 32 bytes at a time.
constexpr int kSlices = 4;
constexpr int kRowsPerWarp = kWarp / kSlices;
constexpr int kThreads = kPanelRows * kSlices;

__global__ void __launch_bounds__(kThreads)
    linear_kernel(const int8_t* q, const float* x_scale, int64_t tokens, int64_t K,
                  const uint8_t* packed, int64_t N, const float* scale, const float* bias,
                  Activation activation, const float* residual, float* y) {
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x / kWarp * kRowsPerWarp + lane % kRowsPerWarp;
  const int slice = lane / kRowsPerWarp;
  const int64_t n = blockIdx.x * int64_t{kPanelRows} + row;
  const int64_t token = blockIdx.y * int64_t{kTileTokens};

  const int64_t quads = ceil_div(K, 4);
  const auto* w = reinterpret_cast<const uint32_t*>(packed) + blockIdx.x * quads * kPanelRows + row;
  const auto* a = reinterpret_cast<const int32_t*>(q);

  int acc[kTileTokens] = {};
  for (int64_t i = slice; i < quads; i += kSlices) {
    const int weights = static_cast<int>(w[i * kPanelRows] ^ 0x80808080);  // w + 128 back to w
#pragma unroll
    for (int t = 0; t < kTileTokens; ++t)
      if (token + t < tokens) acc[t] = __dp4a(weights, a[(token + t) * quads + i], acc[t]);
  }

  const bool swiglu = activation == Activation::swiglu;
  const int64_t columns = swiglu ? N / 2 : N, column = swiglu ? n / 2 : n;
#pragma unroll
  for (int t = 0; t < kTileTokens; ++t) {
    for (int mask = kRowsPerWarp; mask < kWarp; mask *= 2)  // over the slices
      acc[t] += __shfl_xor_sync(kAllLanes, acc[t], mask);
    const bool inside = n < N && token + t < tokens;
    float v = inside ? static_cast<float>(acc[t]) * x_scale[token + t] * scale[n] : 0.0f;
    if (inside && bias) v += bias[n];
    if (activation == Activation::silu) v = silu(v, exp_range(-v));
    const float up = __shfl_xor_sync(kAllLanes, v, 1);  // of the next row, for swiglu
    if (swiglu) v = silu(v, exp_range(-v)) * up;
    if (slice > 0 || !inside || (swiglu && n % 2 == 1)) continue;
    const int64_t at = (token + t) * columns + column;
    y[at] = residual ? v + residual[at] : v;
  }
}

}  // namespace

cudaError_t quantize_tokens(const float* x, int64_t tokens, int64_t K, int8_t* q, float* scale,
                            cudaStream_t stream) {
  quantize_kernel<<<tokens, kWarp, 0, stream>>>(x, K, q, scale);
  return cudaGetLastError();
}

cudaError_t int8_linear(const int8_t* q, const float* x_scale, int64_t tokens, int64_t K,
                        const uint8_t* packed, int64_t N, const float* scale, const float* bias,
                        Activation activation, const float* residual, float* y,
                        cudaStream_t stream) {
  const dim3 grid(ceil_div(N, kPanelRows), ceil_div(tokens, kTileTokens));
  linear_kernel<<<grid, kThreads, 0, stream>>>(q, x_scale, tokens, K, packed, N, scale, bias,
                                               activation, residual, y);
  return cudaGetLastError();
}

}  // namespace owlet::cuda
