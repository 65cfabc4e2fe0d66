// Packing, quantization and the linear layer, on top of any kernel.
#include <algorithm>

#include "kernels.h"

namespace owlet {
namespace {

// The tokens of one parallel task. More tokens read each panel less often; fewer make enough tasks for all threads
// (docs/log.md, "Rows per pass").
constexpr int64_t kTaskTokens = 96;

// Rounding needs no clamp: |x| <= amax, so |x * inverse| <= 127 (1 + 2^-23), which rounds to 127 at most.
CLONES
void quantize_rows(const float* x, int64_t stride, int64_t count, int64_t K, int64_t q_stride, int8_t* q, float* scale,
                   int32_t* q_sum) {
  for (int64_t t = 0; t < count; ++t, x += stride, q += q_stride) {
    int32_t amax = 0;
    uint32_t sum = 0;  // it overflows, and is not used, where the row is not finite
    for (int64_t k = 0; k < K; ++k) amax = std::max(amax, abs_bits(x[k]));
    const Scale s = scale_for(amax);
    for (int64_t k = 0; k < K; ++k) {
      const int32_t rounded = round_to_int(x[k] * s.inverse);
      q[k] = static_cast<int8_t>(rounded);
      sum += static_cast<uint32_t>(rounded);
    }
    const bool zero = s.inverse == 0;  // round_to_int cannot take a NaN or an inf
    std::fill(q + (zero ? 0 : K), q + q_stride, 0);
    scale[t] = s.scale, q_sum[t] = zero ? 0 : static_cast<int32_t>(sum);
  }
}

// Here int8 sums become floats: y from the sums of a panel, for `tokens` tokens. scale has the panel's 64 rows, so that
// loops have a fixed length and no remainder. residual and y start at the first token: `columns` values for each, their
// rows `stride` apart.
CLONES
void epilogue(const int32_t* acc, int64_t tokens, const float* x_scale, const float* scale, Activation activation,
              const float* residual, int64_t columns, int64_t stride, float* y) {
  constexpr int half = kPanelRows / 2;
  for (int64_t t = 0; t < tokens; ++t, acc += kPanelRows) {
    float v[kPanelRows], gate[half], minus[half];
    for (int n = 0; n < kPanelRows; ++n) v[n] = static_cast<float>(acc[n]) * x_scale[t] * scale[n];
    if (activation == Activation::swiglu) {
      for (int i = 0; i < half; ++i) gate[i] = v[2 * i];
      for (int i = 0; i < half; ++i) minus[i] = exp_range(-gate[i]);
      for (int i = 0; i < half; ++i) gate[i] = silu(gate[i], minus[i]);
      for (int i = 0; i < half; ++i) gate[i] *= v[2 * i + 1];
      std::copy_n(gate, half, v);
    }
    float* out = y + t * stride;
    if (residual)
      for (int64_t i = 0; i < columns; ++i) out[i] = v[i] + residual[t * stride + i];
    else
      std::copy_n(v, columns, out);
  }
}

}  // namespace

bool pack_panels(const int8_t* w, int64_t N, int64_t K, int64_t panel_begin, int64_t panel_end, uint8_t* packed) {
  bool symmetric = true;
  std::fill(packed + panel_begin * panel_bytes(K), packed + panel_end * panel_bytes(K), 128);
  for (int64_t n = panel_begin * kPanelRows, end = std::min(N, panel_end * kPanelRows); n < end; ++n) {
    uint8_t* out = packed + packed_at(n, 0, K);
    for (int64_t k = 0; k < K; ++k) {
      symmetric &= w[n * K + k] != -128;
      out[k / 4 * kQuadBytes + k % 4] = static_cast<uint8_t>(w[n * K + k] + 128);
    }
  }
  return symmetric;
}

QuantizedTokens::QuantizedTokens(int64_t tokens, int64_t K)
    : K(K),
      quads(ceil_div(K, 4)),
      q(new (std::align_val_t(kLine)) int8_t[tokens * row_bytes(quads)]),
      scale(new float[tokens]),
      q_sum(new int32_t[tokens]) {}

void QuantizedTokens::quantize(int64_t t, const float* x, int64_t count, int64_t stride) {
  const int64_t bytes = row_bytes(quads);
  quantize_rows(x, stride, count, K, bytes, &q[t * bytes], &scale[t], &q_sum[t]);
}

int64_t Int8Linear::tasks(int64_t tokens) const { return ceil_div(N, kPanelRows) * ceil_div(tokens, kTaskTokens); }

void Int8Linear::forward(const Choice& choice, const QuantizedTokens& x, int64_t tokens, const float* residual,
                         int64_t begin, int64_t end, float* y) const {
  const int64_t blocks = ceil_div(tokens, kTaskTokens);
  const int rows_per_column = activation == Activation::swiglu ? 2 : 1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks * kPanelRows, rows = std::min<int64_t>(kPanelRows, N - n);
    float scales[kPanelRows] = {};
    std::copy_n(scale + n, rows, scales);
    const int64_t block = task % blocks * kTaskTokens, count = std::min(kTaskTokens, tokens - block);
    const auto finish = [&](int64_t t, int64_t n_tokens, const int32_t* acc) {
      const int64_t at = (block + t) * columns() + n / rows_per_column;
      epilogue(acc, n_tokens, &x.scale[block + t], scales, activation, residual ? residual + at : nullptr,
               rows / rows_per_column, columns(), y + at);
    };
    choice.multiply(&x.q[block * row_bytes(x.quads)], &x.q_sum[block], count, packed + n * 4 * x.quads, x.quads,
                    kPanelRows, finish);
  }
}

void Int8Linear::read_row(int64_t n, float* y) const {
  const uint8_t* row = packed + packed_at(n, 0, K);
  for (int64_t k = 0; k < K; ++k) y[k] = static_cast<float>(row[k / 4 * kQuadBytes + k % 4] - 128) * scale[n];
}

}  // namespace owlet
