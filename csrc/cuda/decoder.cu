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
  int8_t *keys, *values;  // this layer's
  float *key_scales, *value_scales;
  int64_t length;
  float* y;  // (batch, n_head * head_dim)
};

template <typename T, typename Join>
__device__ T over_warp(T value, Join join) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = join(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}
__device__ float add(float a, float b) { return a + b; }
__device__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ int larger_int(int a, int b) { return max(a, b); }

// A head's vector in int8: its values are q * scale.
template <int size>
struct alignas(16) Quantized {
  int8_t q[size];
  float scale;
};

// A warp quantizes x (head_dim): RoPE(RMSNorm(x)), or without cos, x itself. Without a weight, there is no norm.
template <int head_dim>
__device__ void prepare(const float* x, const float* weight, float eps, const float* cos, const float* sin,
                        Quantized<head_dim>* to) {
  constexpr int half = head_dim / 2, kPairs = (half + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp;
  float square = 0, first[kPairs] = {}, second[kPairs] = {};
  for (int i = lane; i < head_dim; i += kWarp) square += x[i] * x[i];
  const float norm = weight ? 1.0f / sqrtf(over_warp(square, add) / static_cast<float>(head_dim) + eps) : 1.0f;
  int amax = 0;
  for (int n = 0, i = lane; i < half; i += kWarp, ++n) {
    const float a = x[i] * norm * (weight ? weight[i] : 1.0f);
    const float b = x[i + half] * norm * (weight ? weight[i + half] : 1.0f);
    first[n] = cos ? a * cos[i] - b * sin[i] : a;
    second[n] = cos ? b * cos[i] + a * sin[i] : b;
    amax = max(amax, max(abs_bits(first[n]), abs_bits(second[n])));
  }
  const Scale s = scale_for(over_warp(amax, larger_int));
  for (int n = 0, i = lane; i < half; i += kWarp, ++n) {
    to->q[i] = s.inverse > 0 ? round_to_int(first[n] * s.inverse) : 0;
    to->q[i + half] = s.inverse > 0 ? round_to_int(second[n] * s.inverse) : 0;
  }
  if (lane == 0) to->scale = s.scale;
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
constexpr int kBlock = 64;       // positions whose weights have one scale, as on a CPU

// Attention of one token, for head blockIdx.x of sequence blockIdx.y. A warp takes 64 positions at a time. Each lane
// computes the scores of two of them and then sums every 32nd dimension. Each warp has its own softmax; they are joined
// at the end.
template <int kPieces>
__global__ void __launch_bounds__(kThreads) attention_kernel(Attention in) {
  constexpr int head_dim = kPieces * 16, kDims = (head_dim + kWarp - 1) / kWarp;
  __shared__ Quantized<head_dim> q, key, value;
  __shared__ __align__(16) int8_t weights[kWarps][kBlock];
  __shared__ float parts[kWarps][head_dim];
  __shared__ Softmax of[kWarps];

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t head = blockIdx.x, b = blockIdx.y, group = in.n_head / in.n_kv_head, kv_head = head / group;
  const int pos = *in.pos;
  if (pos >= in.length) __trap();  // do not write past the caches
  const int64_t at = (b * in.n_kv_head + kv_head) * in.length;
  const float* row = in.qkv + b * (in.n_head + 2 * in.n_kv_head) * head_dim;
  const float *cos = in.cos + pos * int64_t{head_dim / 2}, *sin = in.sin + pos * int64_t{head_dim / 2};

  if (warp == 0) prepare(row + head * head_dim, in.q_norm, in.eps, cos, sin, &q);
  if (warp == 1) prepare(row + (in.n_head + kv_head) * head_dim, in.k_norm, in.eps, cos, sin, &key);
  if (warp == 2)
    prepare<head_dim>(row + (in.n_head + in.n_kv_head + kv_head) * head_dim, nullptr, 0, nullptr, nullptr, &value);
  __syncthreads();
  if (head % group == 0) {  // for later tokens; every block of this token has computed it for itself
    for (int i = threadIdx.x; i < head_dim; i += kThreads) {
      in.keys[(at + pos) * head_dim + i] = key.q[i];
      in.values[(at + pos) * head_dim + i] = value.q[i];
    }
    if (threadIdx.x == 0) in.key_scales[at + pos] = key.scale, in.value_scales[at + pos] = value.scale;
  }

  const float factor = q.scale * (1.0f / sqrtf(static_cast<float>(head_dim)));
  Softmax softmax{kNone, 0};
  float sums[kDims] = {};
  for (int first = warp * kBlock; first <= pos; first += kWarps * kBlock) {
    float score[2], weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int p = first + i * kWarp + lane;
      const auto* k = reinterpret_cast<const int4*>(p < pos ? in.keys + (at + p) * head_dim : key.q);
      const auto* query = reinterpret_cast<const int4*>(q.q);
      int dot = 0;
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        dot = __dp4a(query[n].x, k[n].x, __dp4a(query[n].y, k[n].y, dot));
        dot = __dp4a(query[n].z, k[n].z, __dp4a(query[n].w, k[n].w, dot));
      }
      score[i] = static_cast<float>(dot) * factor * (p < pos ? in.key_scales[at + p] : key.scale);
      if (p > pos) score[i] = kNone;
    }
    const float top = over_warp(fmaxf(score[0], score[1]), larger);
    float exponentials = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int p = first + i * kWarp + lane;
      const float e = p > pos ? 0.0f : exp_approx(exp_range(score[i] - top));
      exponentials += e;
      weight[i] = p > pos ? 0.0f : e * (p < pos ? in.value_scales[at + p] : value.scale);
    }
    const Scale s = scale_for(over_warp(max(abs_bits(weight[0]), abs_bits(weight[1])), larger_int));
    for (int i = 0; i < 2; ++i)
      weights[warp][i * kWarp + lane] = s.inverse > 0 ? round_to_int(weight[i] * s.inverse) : 0;
    __syncwarp();
    const Softmax block{top, over_warp(exponentials, add)};
    const float mine = softmax.join(block), theirs = s.scale * expf(top - softmax.max);
    for (int n = 0, d = lane; d < head_dim; d += kWarp, ++n) {
      int total = 0;
      for (int p = 0; p < min(kBlock, pos - first); ++p)
        total += weights[warp][p] * in.values[(at + first + p) * head_dim + d];
      if (pos - first < kBlock) total += weights[warp][pos - first] * value.q[d];
      sums[n] = sums[n] * mine + static_cast<float>(total) * theirs;
    }
    __syncwarp();  // before the weights are overwritten
  }

  for (int n = 0, d = lane; d < head_dim; d += kWarp, ++n) parts[warp][d] = sums[n];
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
    error = int8_linear({x, step.batch, norm, m.norm_eps}, linear, residual, y, w.scratch, stream);
  };
  const int64_t rows = step.batch * m.n_kv_head * step.length, cache = rows * m.head_dim;  // per layer
  for (size_t layer = 0; layer < m.blocks.size(); ++layer) {
    const DecoderBlock& block = m.blocks[layer];
    multiply(w.x, block.input_norm, block.qkv, nullptr, w.qkv);
    if (error == cudaSuccess)
      error = attend({m.n_head, m.n_kv_head, m.head_dim, w.qkv, block.q_norm, block.k_norm, m.norm_eps, m.cos, m.sin,
                      step.pos, step.keys + layer * cache, step.values + layer * cache, step.key_scales + layer * rows,
                      step.value_scales + layer * rows, step.length, w.attn_out},
                     step.batch, stream);
    multiply(w.attn_out, nullptr, block.o, w.x, w.x);
    multiply(w.x, block.post_norm, block.gate_up, nullptr, w.hidden);
    multiply(w.hidden, nullptr, block.down[0], w.x, w.x);
  }
  multiply(w.x, m.norm, m.head, nullptr, step.logits);
  return error;
}

}  // namespace owlet::cuda
