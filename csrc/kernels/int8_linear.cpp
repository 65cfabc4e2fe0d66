// Packing, quantization and the linear layer, on top of any kernel. All of its floating-point code is here, in plain
// loops whose results do not depend on the vector width that the compiler chooses.
#include <algorithm>

#include "kernels.h"

// Compiles a function for wider vectors too; the loader chooses one of them. FLOAT_CLONES have fused multiply-adds,
// which take a hundred times as long in software. (The loader's choice comes before ThreadSanitizer is ready.)
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)
#define INTEGER_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define FLOAT_CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define INTEGER_CLONES
#define FLOAT_CLONES
#endif

namespace owlet {
namespace {

// The tokens of one parallel task: many read a panel less often, few give every thread a task
// (docs/log.md, "Rows per pass").
constexpr int64_t kTaskTokens = 96;

INTEGER_CLONES
int32_t max_abs_bits(const float* x, int64_t K) {
  int32_t amax = 0;
  for (int64_t k = 0; k < K; ++k) amax = std::max(amax, abs_bits(x[k]));
  return amax;
}

// Needs no clamp: |x| <= amax, so |x * inverse| <= 127 (1 + 2^-23), which rounds to 127 at most.
INTEGER_CLONES
int32_t quantize_values(const float* x, int64_t K, float inverse, int8_t* q) {
  int32_t sum = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int32_t rounded = round_to_int(x[k] * inverse);
    q[k] = static_cast<int8_t>(rounded);
    sum += rounded;
  }
  return sum;
}

// Here int8 sums become floats: y from the sums of a panel, for `tokens` tokens. scale and bias have the panel's 64
// rows, so that loops have a fixed length and no remainder. residual and y start at the first token; each token fills
// `columns`, `stride` apart.
FLOAT_CLONES
void epilogue(const int32_t* acc, int64_t tokens, const float* x_scale, const float* scale, const float* bias,
              Activation activation, const float* residual, int64_t columns, int64_t stride, float* y) {
  for (int64_t t = 0; t < tokens; ++t, acc += kPanelRows) {
    float v[kPanelRows], gate[kPanelRows], minus[kPanelRows];
    for (int n = 0; n < kPanelRows; ++n) v[n] = static_cast<float>(acc[n]) * x_scale[t] * scale[n];
    if (bias)
      for (int n = 0; n < kPanelRows; ++n) v[n] += bias[n];
    if (activation == Activation::silu) {
      for (int n = 0; n < kPanelRows; ++n) minus[n] = exp_range(-v[n]);
      for (int n = 0; n < kPanelRows; n += kWide) wide(v + n) = silu(wide(v + n), wide(minus + n));
    }
    if (activation == Activation::swiglu) {
      for (int i = 0; i < kPanelRows / 2; ++i) gate[i] = v[2 * i];
      for (int i = 0; i < kPanelRows / 2; ++i) minus[i] = exp_range(-gate[i]);
      for (int i = 0; i < kPanelRows / 2; i += kWide) wide(gate + i) = silu(wide(gate + i), wide(minus + i));
      for (int i = 0; i < kPanelRows / 2; ++i) gate[i] *= v[2 * i + 1];
      std::copy_n(gate, kPanelRows / 2, v);
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
  const int64_t panel_bytes = ceil_div(K, 4) * kQuadBytes;
  const int64_t row_end = std::min(N, panel_end * kPanelRows);
  bool symmetric = true;
  std::fill(packed + panel_begin * panel_bytes, packed + panel_end * panel_bytes, 128);
  for (int64_t n = panel_begin * kPanelRows; n < row_end; ++n) {
    const int8_t* row = w + n * K;
    uint8_t* out = packed + n / kPanelRows * panel_bytes + n % kPanelRows * 4;
    for (int64_t k = 0; k < K; ++k) {
      symmetric &= row[k] != -128;
      out[k / 4 * kQuadBytes + k % 4] = static_cast<uint8_t>(row[k] + 128);
    }
  }
  return symmetric;
}

QuantizedRow quantize_row(const float* x, int64_t K, int8_t* q) {
  const TokenScale s = token_scale(max_abs_bits(x, K));
  if (s.inverse != 0) return {s.scale, quantize_values(x, K, s.inverse, q)};
  std::fill_n(q, K, 0);  // x may hold a NaN or an inf, which round_to_int cannot take
  return {s.scale, 0};
}

QuantizedTokens::QuantizedTokens(int64_t tokens, int64_t K)
    : K(K),
      quads(ceil_div(K, 4)),
      q(new (std::align_val_t(kLine)) int8_t[tokens * row_bytes(quads)]),
      scale(new float[tokens]),
      q_sum(new int32_t[tokens]) {}

void QuantizedTokens::quantize(int64_t t, const float* x) {
  int8_t* row = &q[t * row_bytes(quads)];
  const QuantizedRow done = quantize_row(x, K, row);
  scale[t] = done.scale;
  q_sum[t] = done.sum;
  std::fill(row + K, row + row_bytes(quads), 0);
}

int64_t Int8Linear::tasks(int64_t tokens) const { return ceil_div(N, kPanelRows) * ceil_div(tokens, kTaskTokens); }

void Int8Linear::forward(const QuantizedTokens& x, int64_t tokens, const float* residual, int64_t begin,
                         int64_t end, float* y) const {
  const Kernel& kernel = owlet::kernel();
  DotPanel* const once = variant().dot_panel;
  const int64_t blocks = ceil_div(tokens, kTaskTokens);
  const int rows_per_column = activation == Activation::swiglu ? 2 : 1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks * kPanelRows, rows = std::min<int64_t>(kPanelRows, N - n);
    const uint8_t* panel = packed + n * 4 * x.quads;
    float scales[kPanelRows] = {}, biases[kPanelRows] = {};
    std::copy_n(scale + n, rows, scales);
    if (bias) std::copy_n(bias + n, rows, biases);

    const int64_t block = task % blocks * kTaskTokens, block_end = std::min(block + kTaskTokens, tokens);
    for (int64_t t = block, tile; t < block_end; t += tile) {
      tile = ceil_div(block_end - t, ceil_div(block_end - t, kernel.tile_tokens));  // tiles of about equal size
      int32_t acc[kMaxTileTokens][kPanelRows];
      (tile == 1 ? once : kernel.dot_panel[tile - 1])(&x.q[t * row_bytes(x.quads)], &x.q_sum[t], panel, x.quads, acc[0]);
      const int64_t at = t * columns() + n / rows_per_column;
      epilogue(acc[0], tile, &x.scale[t], scales, bias ? biases : nullptr, activation,
               residual ? residual + at : nullptr, rows / rows_per_column, columns(), y + at);
    }
  }
}

void Int8Linear::read_row(int64_t n, float* y) const {
  const uint8_t* row = packed + n / kPanelRows * ceil_div(K, 4) * kQuadBytes + n % kPanelRows * 4;
  for (int64_t k = 0; k < K; ++k) y[k] = static_cast<float>(row[k / 4 * kQuadBytes + k % 4] - 128) * scale[n];
}

}  // namespace owlet
