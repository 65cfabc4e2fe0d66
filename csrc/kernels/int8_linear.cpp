// Packing, quantization and the linear layer, on top of any kernel. All floating point is here,
// written as plain loops whose result does not depend on how wide the compiler vectorises them.
#include <algorithm>

#include "kernels.h"
#include "numerics.h"

// Also compile a function for AVX2 and choose when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__)
#define OWLET_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define OWLET_CLONES
#endif

namespace owlet {
namespace {

// Tokens of one parallel task: enough to read a panel once for many, few enough to share them out.
constexpr int64_t kTaskTokens = 16 * kTileTokens;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

OWLET_CLONES
int32_t max_abs_bits(const float* x, int64_t K) {
  int32_t amax = 0;
  for (int64_t k = 0; k < K; ++k) amax = std::max(amax, abs_bits(x[k]));
  return amax;
}

// Needs no clamp: |x| <= amax, so |x * inverse| <= 127 (1 + 2^-23), which rounds to 127 at most.
OWLET_CLONES
int32_t quantize_token(const float* x, int64_t K, float inverse, int8_t* q) {
  int32_t sum = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int32_t rounded = round_to_int(x[k] * inverse);
    q[k] = static_cast<int8_t>(rounded);
    sum += rounded;
  }
  return sum;
}

// From one token's sums for `rows` rows of w to its outputs. Every pointer is to the first of them.
OWLET_CLONES
void epilogue(const int32_t* acc, int rows, float x_scale, const float* scale, const float* bias,
              Activation activation, const float* residual, float* y) {
  float v[kPanelRows];
  for (int n = 0; n < rows; ++n) v[n] = static_cast<float>(acc[n]) * x_scale * scale[n];
  if (bias)
    for (int n = 0; n < rows; ++n) v[n] += bias[n];

  if (activation == Activation::silu)
    for (int n = 0; n < rows; ++n) v[n] = silu(v[n]);
  int columns = rows;
  if (activation == Activation::swiglu) {
    columns = rows / 2;
    for (int i = 0; i < columns; ++i) v[i] = silu(v[2 * i]) * v[2 * i + 1];
  }

  if (residual)
    for (int i = 0; i < columns; ++i) y[i] = v[i] + residual[i];
  else
    std::copy_n(v, columns, y);
}

}  // namespace

bool pack_panels(const int8_t* w, int64_t N, int64_t K, int64_t panel_begin, int64_t panel_end,
                 uint8_t* packed) {
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

QuantizedTokens::QuantizedTokens(int64_t tokens, int64_t K)
    : tokens(tokens),
      K(K),
      quads(ceil_div(K, 4)),
      q(new int8_t[tokens * 4 * quads]),
      scale(new float[tokens]),
      q_sum(new int32_t[tokens]) {}

void QuantizedTokens::quantize(const float* x, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float* token = x + t * K;
    int8_t* row = &q[t * 4 * quads];
    const TokenScale s = token_scale(max_abs_bits(token, K));
    scale[t] = s.scale;
    if (s.inverse == 0) {  // x may hold a NaN or an inf, which must not reach the rounding
      std::fill_n(row, K, 0);
      q_sum[t] = 0;
    } else {
      q_sum[t] = quantize_token(token, K, s.inverse, row);
    }
    std::fill(row + K, row + 4 * quads, 0);
  }
}

int64_t Int8Linear::tasks(int64_t tokens) const {
  return ceil_div(N, kPanelRows) * ceil_div(tokens, kTaskTokens);
}

void Int8Linear::forward(const QuantizedTokens& x, const float* residual, int64_t begin,
                         int64_t end, float* y) const {
  const Kernel& kernel = owlet::kernel();
  const int64_t blocks = ceil_div(x.tokens, kTaskTokens);
  const int rows_a_column = activation == Activation::swiglu ? 2 : 1;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks * kPanelRows;
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, N - n));
    const uint8_t* panel = packed + n * 4 * x.quads;
    const int64_t block = task % blocks * kTaskTokens;
    const int64_t block_end = std::min(block + kTaskTokens, x.tokens);

    for (int64_t t = block; t < block_end; t += kTileTokens) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTileTokens, block_end - t));
      int32_t acc[kTileTokens][kPanelRows];
      kernel.dot_panel[tokens - 1](&x.q[t * 4 * x.quads], &x.q_sum[t], panel, x.quads, acc[0]);
      for (int i = 0; i < tokens; ++i) {
        const int64_t at = (t + i) * columns() + n / rows_a_column;
        epilogue(acc[i], rows, x.scale[t + i], scale + n, bias ? bias + n : nullptr, activation,
                 residual ? residual + at : nullptr, y + at);
      }
    }
  }
}

}  // namespace owlet
