// Compile with -fmad=false: a fused multiply-add would round differently from the CPU.
//
// Both kernels multiply on the tensor cores, 16 tokens x 8 output channels x 32 k at a time. The order of k is free as
// long as both operands have the same. With one instruction, lane (g, t) loads 16 bytes of a channel, from k = 16t on.
// They serve as its operands of two products: k = 4t .. 4t+3 and 16+4t .. 19+4t of each. The quantized tokens are stored
// in the order of those operands.
#include "int8_linear.h"
#include "primitives.cuh"

namespace owlet::cuda {
namespace {

// ---- activations to int8

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A block quantizes a token. It calls store(k, q) with four values at a time, up to the end of the last tile. RMSNorm's
// factor is the same for the whole token, so it cancels out of q and is multiplied into the scale. So one pass over x
// finds both the maximum and the factor.
template <typename Store>
__device__ void quantize_token(const Tokens& tokens, int64_t token, int64_t K, Store store, float* scale) {
  __shared__ int amaxes[kWarps];
  __shared__ float squares[kWarps];
  const float* x = tokens.x + token * K;
  const auto value = [&](int64_t k) { return tokens.norm ? x[k] * tokens.norm[k] : x[k]; };
  int amax = 0;
  float square = 0;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    amax = max(amax, abs_bits(value(k)));
    square += x[k] * x[k];
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    amax = max(amax, __shfl_xor_sync(kAllLanes, amax, mask));
    square += __shfl_xor_sync(kAllLanes, square, mask);
  }
  __syncthreads();  // other threads may still read the arrays of the token before
  amaxes[threadIdx.x / kWarp] = amax;
  squares[threadIdx.x / kWarp] = square;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) amax = max(amax, amaxes[i]);
  square = 0;
  for (int i = 0; i < kWarps; ++i) square += squares[i];
  const Scale s = scale_for(amax);
  const float factor = tokens.norm ? 1.0f / sqrtf(square / static_cast<float>(K) + tokens.eps) : 1.0f;
  if (threadIdx.x == 0) *scale = s.scale * factor;
  for (int64_t k = 4 * threadIdx.x; k < k_tiles(K) * kTileK; k += 4 * kThreads) {
    unsigned q = 0;
    for (int i = 0; i < 4; ++i)
      if (k + i < K && s.inverse > 0) q |= (round_to_int(value(k + i) * s.inverse) & 0xffu) << (8 * i);
    store(k, static_cast<int>(q));
  }
}

// The index of four values of a token in Scratch's q, as an array of int. Of 16 tokens x 64 k, lane (g, t) has 16 bytes
// for each of two products: token g at 4 k, token g + 8 at the same 4 k, and both at the next 4 k.
__device__ int64_t fragment(int64_t token, int64_t k, int64_t tiles_k) {
  const int64_t tile = token / 16 * tiles_k + k / kTileK;
  const int lane = token % 8 * 4 + k % kTileK / 16, product = k % 16 / 8;
  return ((tile * 2 + product) * kWarp + lane) * 4 + k % 8 / 4 * 2 + token % 16 / 8;
}

__global__ void __launch_bounds__(kThreads) quantize_kernel(Tokens tokens, int64_t K, Scratch to) {
  const int64_t token = blockIdx.x, tiles_k = k_tiles(K);
  auto* q = reinterpret_cast<int*>(to.q);
  quantize_token(tokens, token, K, [&](int64_t k, int four) { q[fragment(token, k, tiles_k)] = four; },
                 to.scale + token);
}

// ---- sums to y

struct Output {
  Linear linear;
  const float* residual;
  float* y;
  struct Channels {  // n and n + 1; n is even
    int64_t n;
    float scale[2];
  };
  __device__ Channels channels(int64_t n) const {
    const auto scale = [&](int64_t n) { return n < linear.N ? linear.scale[n] : 0.0f; };
    return {n, {scale(n), scale(n + 1)}};
  }
  __device__ void put(int64_t at, float v) const { y[at] = residual ? v + residual[at] : v; }
  // Here int8 sums become floats: stores two channels of a token, whose scale is x_scale.
  __device__ void store(int64_t token, float x_scale, const Channels& of, int sum0, int sum1) const {
    const int64_t n = of.n, at = token * linear.N + n;
    if (n >= linear.N) return;
    float v0 = static_cast<float>(sum0) * x_scale * of.scale[0], v1 = static_cast<float>(sum1) * x_scale * of.scale[1];
    if (linear.activation == Activation::swiglu)
      return put(token * (linear.N / 2) + n / 2, silu(v0, exp_range(-v0)) * v1);
    if (linear.N % 2 == 0) {  // then pairs are aligned
      if (residual) {
        const float2 r = *reinterpret_cast<const float2*>(residual + at);
        v0 += r.x;
        v1 += r.y;
      }
      *reinterpret_cast<float2*>(y + at) = float2{v0, v1};
    } else {
      put(at, v0);
      if (n + 1 < linear.N) put(at + 1, v1);
    }
  }
};

// ---- gemv, for up to 64 tokens: bound by reading the weights

// A block takes one tile of 8 output channels after another. Its warps split the tile's k and add their sums last.
// If a single token fits into kOwnBytes, every block quantizes it for itself, which is faster than a launch of
// quantize_kernel. The next weights are loaded while a block quantizes and while it adds sums. The constants of both
// kernels: docs/log.md, "gemv and gemm".
constexpr int kInFlight = 4;  // loads per thread
constexpr int kOwnBytes = 16384;

inline __host__ __device__ bool quantizes_itself(int64_t tokens, int64_t K) {
  return tokens == 1 && k_tiles(K) * kTileK <= kOwnBytes;
}

// For at most 16 * kGroups tokens.
template <int kGroups>
__global__ void __launch_bounds__(kThreads, kGroups == 1 ? 3 : 1)
    gemv_kernel(Tokens x, Scratch quantized, Output output) {
  constexpr bool may_own = kGroups == 1;
  __shared__ __align__(16) int8_t own_q[may_own ? kOwnBytes : 1];
  __shared__ float own_scale;
  __shared__ int2 partial[2][kGroups][2][kWarps][kWarp];  // [buffer][group of 16 tokens][half of 8][warp][lane]
  const Linear& linear = output.linear;
  const int tiles_k = k_tiles(linear.K), tiles = ceil_div(linear.N, kTileRows);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;

  int4 next[kInFlight];
  const auto load = [&](int64_t tile, int k) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i, k += kWarps)
      next[i] = k < tiles_k ? load_weights(linear.packed + (tile * tiles_k + k) * kTileBytes + lane * 16) : int4{};
  };
  load(blockIdx.x, warp);

  const bool own = may_own && quantizes_itself(x.count, linear.K);
  const float* x_scale = own ? &own_scale : quantized.scale;
  if (own) {
    quantize_token(x, 0, linear.K, [&](int64_t k, int four) { *reinterpret_cast<int*>(own_q + k) = four; }, &own_scale);
    __syncthreads();
  }

  int buffer = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
    int sum[kGroups][4] = {};
    for (int k = warp; k < tiles_k; k += kInFlight * kWarps) {
      int4 weights[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) weights[i] = next[i];
      const int next_k = k + kInFlight * kWarps;
      if (next_k < tiles_k)
        load(tile, next_k);
      else if (tile + static_cast<int>(gridDim.x) < tiles)
        load(tile + gridDim.x, warp);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (k + i * kWarps >= tiles_k) break;
        const int4 b = weights[i];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          if (own) {
            const int8_t* own_k = own_q + (k + i * kWarps) * kTileK + t * 16;
            const int4 a = g == 0 ? *reinterpret_cast<const int4*>(own_k) : int4{};
            mma(sum[group], a.x, 0, a.y, 0, b.x, b.y);
            mma(sum[group], a.z, 0, a.w, 0, b.z, b.w);
          } else if (16 * group < x.count) {  // past the last token is garbage, whose sums are not stored
            const auto* a = reinterpret_cast<const int4*>(quantized.q) + (group * tiles_k + k + i * kWarps) * 2 * kWarp;
            const int4 a0 = a[lane], a1 = a[lane + kWarp];
            mma(sum[group], a0.x, a0.y, a0.z, a0.w, b.x, b.y);
            mma(sum[group], a1.x, a1.y, a1.z, a1.w, b.z, b.w);
          }
        }
      }
    }

#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      for (int half = 0; half < 2; ++half)
        partial[buffer][group][half][warp][lane] = make_int2(sum[group][2 * half], sum[group][2 * half + 1]);
    __syncthreads();  // one per tile is enough, because the next tile uses the other buffer
    for (int i = threadIdx.x; i < kGroups * 2 * kWarp; i += kThreads) {
      const int group = i / (2 * kWarp), half = i / kWarp % 2, of = i % kWarp;
      const int token = 16 * group + 8 * half + of / 4;
      if (token >= x.count) continue;
      int2 total = make_int2(0, 0);
      for (int w = 0; w < kWarps; ++w) {
        total.x += partial[buffer][group][half][w][of].x;
        total.y += partial[buffer][group][half][w][of].y;
      }
      const auto channels = output.channels(int64_t{tile} * kTileRows + 2 * (of % 4));
      output.store(token, x_scale[token], channels, total.x, total.y);
    }
  }
}

// ---- gemm, for more tokens: bound by the tensor cores

// A block computes 128 tokens x 128 output channels, and each of its 4 warps a quarter of that. Tiles of 64 k are
// copied to shared memory while the tiles before them are multiplied.
constexpr int kBlock = 128;
constexpr int kBlockThreads = 128;
constexpr int kStages = 3;
constexpr int kStageBytes = 2 * kBlock * kTileK;
constexpr int kWarpTokens = 64, kWarpRows = 64;
constexpr int kPieces = kStageBytes / 2 / 16;   // pieces of 16 bytes per operand
constexpr int kStored = 8;                      // tokens whose scales are loaded together
constexpr int kSumsStride = kWarpRows / 2 + 4;  // in pairs, so that rows 4 apart use different banks
static_assert(kBlockThreads / kWarp * 16 * kSumsStride * sizeof(int2) <= kStages * kStageBytes);

__global__ void __launch_bounds__(kBlockThreads) gemm_kernel(Scratch x, int64_t tokens, Output output) {
  __shared__ __align__(128) int8_t stages[kStages][kStageBytes];
  const Linear& linear = output.linear;
  const int tiles_k = k_tiles(linear.K);
  const int64_t tiles = ceil_div(linear.N, kTileRows);
  const int64_t first_token = blockIdx.x * int64_t{kBlock}, first_tile = blockIdx.y * int64_t{kBlock / kTileRows};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_token = warp / 2 * kWarpTokens, warp_row = warp % 2 * kWarpRows;

  // 64 pieces of 16 bytes are a k tile of 16 tokens, 32 are one of 8 channels. Past the end, the last ones are copied
  // again; their sums are not stored.
  const int64_t groups = ceil_div(tokens, 16), first_group = first_token / 16;
  const auto copy = [&](int k) {
    int8_t *a = stages[k % kStages], *b = a + kStageBytes / 2;
#pragma unroll
    for (int n = 0; n < kPieces / kBlockThreads; ++n) {
      const int i = threadIdx.x + n * kBlockThreads;
      const int64_t group = min(first_group + i / (2 * kWarp), groups - 1);
      const int64_t tile = min(first_tile + i / kWarp, tiles - 1);
      copy_async(a + i * 16, x.q + ((group * tiles_k + k) * 2 * kWarp + i % (2 * kWarp)) * 16);
      copy_async(b + i * 16, linear.packed + (tile * tiles_k + k) * kTileBytes + i % kWarp * 16);
    }
  };

  int sum[kWarpTokens / 16][kWarpRows / kTileRows][4] = {};
  for (int k = 0; k < kStages - 1; ++k) {
    if (k < tiles_k) copy(k);
    end_group();
  }
  for (int k = 0; k < tiles_k; ++k) {
    wait_groups<kStages - 2>();
    __syncthreads();  // stage k is complete, and no thread reads stage k - 1, which is filled next
    if (k + kStages - 1 < tiles_k) copy(k + kStages - 1);
    end_group();
    const auto* a = reinterpret_cast<const int4*>(stages[k % kStages] + warp_token * kTileK) + lane;
    const auto* b = reinterpret_cast<const int4*>(stages[k % kStages] + kStageBytes / 2 + warp_row * kTileK) + lane;
    int4 w[kWarpRows / kTileRows];
#pragma unroll
    for (int j = 0; j < kWarpRows / kTileRows; ++j) w[j] = b[j * kWarp];
#pragma unroll
    for (int i = 0; i < kWarpTokens / 16; ++i) {
      const int4 a0 = a[2 * i * kWarp], a1 = a[(2 * i + 1) * kWarp];
#pragma unroll
      for (int j = 0; j < kWarpRows / kTileRows; ++j) {
        mma(sum[i][j], a0.x, a0.y, a0.z, a0.w, w[j].x, w[j].y);
        mma(sum[i][j], a1.x, a1.y, a1.z, a1.w, w[j].z, w[j].w);
      }
    }
  }

  // The sums go through shared memory, 16 tokens at a time, so that a warp writes 64 adjacent channels of a token.
  __syncthreads();  // no thread reads the stages any more
  auto* sums = reinterpret_cast<int2*>(stages[0]) + warp * 16 * kSumsStride;
  const auto channels = output.channels(first_tile * kTileRows + warp_row + 2 * lane);
#pragma unroll
  for (int i = 0; i < kWarpTokens / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpRows / kTileRows; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sums[(8 * half + lane / 4) * kSumsStride + 4 * j + lane % 4] =
            make_int2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
    __syncwarp();
    const int64_t first = first_token + warp_token + 16 * i;
#pragma unroll 1
    for (int part = 0; part < 16; part += kStored) {
      float scale[kStored];  // all loads before the first store, behind which the compiler would not move them up
#pragma unroll
      for (int t = 0; t < kStored; ++t) scale[t] = x.scale[min(first + part + t, tokens - 1)];
#pragma unroll
      for (int t = 0; t < kStored; ++t) {
        const int2 pair = sums[(part + t) * kSumsStride + lane];
        if (first + part + t < tokens) output.store(first + part + t, scale[t], channels, pair.x, pair.y);
      }
    }
    __syncwarp();
  }
}

// Launches as many blocks as run at once: more would only quantize x again.
template <int kGroups>
cudaError_t launch_gemv(const Tokens& x, const Scratch& scratch, const Output& output, cudaStream_t stream) {
  int device, processors, blocks;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, gemv_kernel<kGroups>, kThreads, 0);
  if (error != cudaSuccess) return error;
  const dim3 grid(min(ceil_div(output.linear.N, kTileRows), int64_t{blocks} * processors));
  return launch(gemv_kernel<kGroups>, grid, kThreads, stream, x, scratch, output);
}

}  // namespace

cudaError_t int8_linear(const Tokens& x, const Linear& linear, const float* residual, float* y, const Scratch& scratch,
                        cudaStream_t stream) {
  const Output output{linear, residual, y};
  if (!quantizes_itself(x.count, linear.K)) {
    const cudaError_t error = launch(quantize_kernel, x.count, kThreads, stream, x, linear.K, scratch);
    if (error != cudaSuccess) return error;
  }
  if (x.count <= 16) return launch_gemv<1>(x, scratch, output, stream);
  if (x.count <= 32) return launch_gemv<2>(x, scratch, output, stream);
  if (x.count <= 64) return launch_gemv<4>(x, scratch, output, stream);
  const dim3 grid(ceil_div(x.count, kBlock), ceil_div(linear.N, kBlock));
  return launch(gemm_kernel, grid, kBlockThreads, stream, scratch, x.count, output);
}

}  // namespace owlet::cuda
