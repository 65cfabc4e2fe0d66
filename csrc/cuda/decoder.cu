// Compile with -fmad=false, like int8_linear.cu.
#include "decoder.h"

#include "primitives.cuh"

namespace owlet::cuda {
namespace {

constexpr int kThreads = 256;  // docs/log.md, "CUDA attention"
constexpr int kWarps = kThreads / kWarp;

// x (batch, n_embd) := the tokens' rows of the table. Each block takes one token.
__global__ void __launch_bounds__(kThreads) embed_kernel(Linear table, const int64_t* tokens, float* x) {
  const int64_t token = tokens[blockIdx.x];
  const int8_t* row = table.packed + token / kTileRows * k_tiles(table.K) * kTileBytes + token % kTileRows * kTileK;
  for (int64_t k = threadIdx.x; k < table.K; k += kThreads)
    x[blockIdx.x * table.K + k] = row[k / kTileK * kTileBytes + k % kTileK] * table.scale[token];
}

struct Attention {
  int64_t n_head, n_kv_head, head_dim;
  const float *qkv, *q_norm, *k_norm;
  float eps;
  const float *cos, *sin;
  const int64_t* pos;
  float *keys, *values;  // of this layer
  int64_t length;
  float* y;  // (batch, n_head * head_dim)
};

// A warp writes RoPE(RMSNorm(x)) * factor of one head's x (head_dim). Without a weight, there is no norm.
__device__ void norm_and_rope(const float* x, const float* weight, float eps, const float* cos, const float* sin,
                              int head_dim, float factor, float* to) {
  const int lane = threadIdx.x % kWarp, half = head_dim / 2;
  float square = 0;
  for (int i = lane; i < head_dim; i += kWarp) square += x[i] * x[i];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) square += __shfl_xor_sync(kAllLanes, square, mask);
  const float scale = weight ? 1.0f / sqrtf(square / static_cast<float>(head_dim) + eps) : 1.0f;
  for (int i = lane; i < half; i += kWarp) {
    const float a = x[i] * scale * (weight ? weight[i] : 1.0f);
    const float b = x[i + half] * scale * (weight ? weight[i + half] : 1.0f);
    to[i] = (a * cos[i] - b * sin[i]) * factor;
    to[i + half] = (b * cos[i] + a * sin[i]) * factor;
  }
}

struct Softmax {  // over part of the keys (Milakov and Gimelshein, 2018)
  float max, sum;
  // Joins another part and returns the factor for the sums of this part.
  __device__ float join(Softmax other) {
    const float top = fmaxf(max, other.max), mine = expf(max - top), theirs = expf(other.max - top);
    *this = {top, sum * mine + other.sum * theirs};
    return mine;
  }
};

constexpr float kNone = -1e30f;  // is below every score, and unlike -inf, kNone - kNone is 0

// Attention of one token, for head blockIdx.x of sequence blockIdx.y. 4 lanes share a key, and each takes kPieces times
// 4 numbers of it. So a warp reads 8 keys at a time. Each 4 lanes have a softmax of their own, joined at the end.
template <int kPieces>
__global__ void __launch_bounds__(kThreads) attention_kernel(Attention in) {
  constexpr int head_dim = kPieces * 16;
  __shared__ __align__(16) float q[head_dim], key[head_dim], value[head_dim];
  __shared__ __align__(16) float parts[kWarps][head_dim];
  __shared__ Softmax of[kWarps];

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t head = blockIdx.x, b = blockIdx.y, group = in.n_head / in.n_kv_head, kv_head = head / group;
  const int pos = *in.pos;
  if (pos >= in.length) __trap();  // do not write past the caches
  const int64_t at = (b * in.n_kv_head + kv_head) * in.length;
  const float* row = in.qkv + b * (in.n_head + 2 * in.n_kv_head) * head_dim;
  const float *cos = in.cos + pos * int64_t{head_dim / 2}, *sin = in.sin + pos * int64_t{head_dim / 2};

  if (warp == 0) norm_and_rope(row + head * head_dim, in.q_norm, in.eps, cos, sin, head_dim, 1.0f / sqrtf(head_dim), q);
  if (warp == 1)
    norm_and_rope(row + (in.n_head + kv_head) * head_dim, in.k_norm, in.eps, cos, sin, head_dim, 1.0f, key);
  if (warp == 2)
    for (int i = lane; i < head_dim; i += kWarp) value[i] = row[(in.n_head + in.n_kv_head + kv_head) * head_dim + i];
  __syncthreads();
  if (head % group == 0)  // for later tokens; every block of this token has computed it for itself
    for (int i = threadIdx.x; i < head_dim; i += kThreads) {
      in.keys[(at + pos) * head_dim + i] = key[i];
      in.values[(at + pos) * head_dim + i] = value[i];
    }
  const int part = lane % 4;
  const auto piece = [&](const float* x, int i) { return reinterpret_cast<const float4*>(x)[i * 4 + part]; };
  float4 query[kPieces], sum[kPieces] = {};
  for (int i = 0; i < kPieces; ++i) query[i] = piece(q, i);
  Softmax softmax{kNone, 0};
  for (int first = warp * 8; first <= pos; first += kWarps * 8) {  // the same for all lanes of a warp
    const int j = first + lane / 4;
    const float* k = j < pos ? in.keys + (at + j) * head_dim : key;
    const float* v = j < pos ? in.values + (at + j) * head_dim : value;
    float score = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float4 a = query[i], b = piece(k, i);
      score += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
    }
    score += __shfl_xor_sync(kAllLanes, score, 1);
    score += __shfl_xor_sync(kAllLanes, score, 2);
    if (j > pos) continue;
    const float top = fmaxf(softmax.max, score), before = expf(softmax.max - top), weight = expf(score - top);
    softmax = {top, softmax.sum * before + weight};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float4 b = piece(v, i);
      sum[i] = {sum[i].x * before + weight * b.x, sum[i].y * before + weight * b.y, sum[i].z * before + weight * b.z,
                sum[i].w * before + weight * b.w};
    }
  }

  for (int mask = 4; mask < kWarp; mask *= 2) {
    const float mine = softmax.join(
        {__shfl_xor_sync(kAllLanes, softmax.max, mask), __shfl_xor_sync(kAllLanes, softmax.sum, mask)});
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      float* x[] = {&sum[i].x, &sum[i].y, &sum[i].z, &sum[i].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        *x[c] *= mine;
        *x[c] += __shfl_xor_sync(kAllLanes, *x[c], mask);
      }
    }
  }
  if (lane < 4)
    for (int i = 0; i < kPieces; ++i) reinterpret_cast<float4*>(parts[warp])[i * 4 + part] = sum[i];
  if (lane == 0) of[warp] = softmax;
  __syncthreads();
  Softmax all{kNone, 0};
  for (int w = 0; w < kWarps; ++w) all.join(of[w]);
  for (int d = threadIdx.x; d < head_dim; d += kThreads) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += parts[w][d] * expf(of[w].max - all.max);
    in.y[(b * in.n_head + head) * head_dim + d] = total / all.sum;
  }
}

template <int kPieces = 1>
cudaError_t attend(const Attention& in, int64_t batch, cudaStream_t stream) {
  if constexpr (kPieces * kHeadDimStep > kMaxHeadDim) {
    return cudaErrorInvalidValue;
  } else {
    if (in.head_dim != kPieces * kHeadDimStep) return attend<kPieces + 1>(in, batch, stream);
    return launch(attention_kernel<kPieces>, dim3(in.n_head, batch), kThreads, stream, in);
  }
}

}  // namespace

cudaError_t decode(const DecoderModel& m, const Step& step, const Workspace& w, cudaStream_t stream) {
  cudaError_t error = launch(embed_kernel, dim3(step.batch), kThreads, stream, m.embedding, step.tokens, w.x);
  const auto multiply = [&](const float* x, const float* norm, const Linear& linear, const float* residual, float* y) {
    if (error != cudaSuccess) return;
    error = int8_linear<float>({x, step.batch, norm, m.norm_eps}, linear, residual, y, w.scratch, stream);
  };
  const int64_t cache = step.batch * m.n_kv_head * step.length * m.head_dim;  // numbers per layer
  for (size_t layer = 0; layer < m.blocks.size(); ++layer) {
    const DecoderBlock& block = m.blocks[layer];
    multiply(w.x, block.input_norm, block.qkv, nullptr, w.qkv);
    if (error == cudaSuccess)
      error = attend({m.n_head, m.n_kv_head, m.head_dim, w.qkv, block.q_norm, block.k_norm, m.norm_eps, m.cos, m.sin,
                      step.pos, step.keys + layer * cache, step.values + layer * cache, step.length, w.attn_out},
                     step.batch, stream);
    multiply(w.attn_out, nullptr, block.o, w.x, w.x);
    multiply(w.x, block.post_norm, block.gate_up, nullptr, w.hidden);
    multiply(w.hidden, nullptr, block.down[0], w.x, w.x);
  }
  multiply(w.x, m.norm, m.head, nullptr, step.logits);
  return error;
}

}  // namespace owlet::cuda
