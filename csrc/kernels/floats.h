// RMSNorm, rotary positions and attention's sums in fp32: plain loops, whose results do not depend on the vector width
// that the compiler chooses. Sums use as many lanes on every CPU, so they have one order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace owlet {

// Joins the upper half of N lanes with the lower until one is left.
template <int N, typename Join>
inline float reduce(float* lanes, Join join) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    for (int l = 0; l < N / 2; ++l) lanes[l] = join(lanes[l], lanes[l + N / 2]);
    return reduce<N / 2>(lanes, join);
  }
}

inline float add(float a, float b) { return a + b; }
inline float larger(float a, float b) { return a > b ? a : b; }

// y = x / rms(x) * weight, each (size).
CLONES
static void rms_norm(const float* __restrict x, const float* __restrict weight, int64_t size, float eps,
                     float* __restrict y) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += x[i + l] * x[i + l];
  for (int l = 0; i + l < size; ++l) lanes[l] += x[i + l] * x[i + l];
  const float inverse = 1.0f / std::sqrt(reduce<16>(lanes, add) / static_cast<float>(size) + eps);
  for (i = 0; i < size; ++i) y[i] = x[i] * inverse * weight[i];
}

// y = x, with the pairs (x[i], x[i + half]) rotated by one position's angles: cos, sin (half).
CLONES
static void rope(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t half,
                 float* __restrict y) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    y[i] = a * cos[i] - b * sin[i];
    y[i + half] = b * cos[i] + a * sin[i];
  }
}

// scores[t][n] = acc[t][n] * q_scale[t] * factor * key_scales[n], for the keys of a panel; scores are `stride` apart.
CLONES
static void scale_sums(const int32_t* acc, int64_t tokens, const float* q_scale, float factor, const float* key_scales,
                       float* scores, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t, acc += kPanelRows, scores += stride) {
    const float scale = q_scale[t] * factor;
    for (int n = 0; n < kPanelRows; ++n) scores[n] = static_cast<float>(acc[n]) * scale * key_scales[n];
  }
}

// y[t][n] += acc[t][n] * scale[t] * inverse[t], for `count` dimensions of a panel of values, from `first` on.
CLONES
static void add_sums(const int32_t* acc, int64_t tokens, const float* scale, const float* inverse, int64_t first,
                     int64_t count, float* const* y) {
  for (int64_t t = 0; t < tokens; ++t, acc += kPanelRows) {
    const float factor = scale[t] * inverse[t];
    float* const out = y[t] + first;
    for (int64_t n = 0; n < count; ++n) out[n] += static_cast<float>(acc[n]) * factor;
  }
}

// scores (count) := e^(score - the largest) * value_scales, and zeros up to a multiple of 64, for which both have room.
// Returns what is left of softmax: 1 / the sum of the exponentials.
CLONES
static float softmax(float* __restrict scores, const float* __restrict value_scales, int64_t count) {
  constexpr int kBlock = kPanelRows;  // loops of fixed length
  const int64_t padded = ceil_div(count, kBlock) * kBlock;
  std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
  float top[kBlock], x[kBlock], sums[kBlock] = {};
  std::copy_n(scores, kBlock, top);
  for (int64_t p = kBlock; p < padded; p += kBlock)
    for (int n = 0; n < kBlock; ++n) top[n] = larger(scores[p + n], top[n]);
  const float most = reduce<kBlock>(top, larger);
  for (int64_t p = 0; p < padded; p += kBlock) {
    for (int n = 0; n < kBlock; ++n) x[n] = exp_range(scores[p + n] - most);
    for (int n = 0; n < kBlock; ++n) x[n] = exp_approx(x[n]);
    for (int n = 0; n < kBlock; ++n) sums[n] += x[n];  // e^-87 of the padding adds nothing
    for (int n = 0; n < kBlock; ++n) scores[p + n] = x[n] * value_scales[p + n];
  }
  std::fill(scores + count, scores + padded, 0.0f);
  return 1.0f / reduce<kBlock>(sums, add);  // NaN if a score is
}

}  // namespace owlet
