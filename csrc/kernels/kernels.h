// The int8 kernels, without torch:  y = activation(x @ w.T + bias) + residual
//
// x is quantized to int8 with one scale per token (row of x); w is int8 with one scale per output channel. Every
// instruction set computes the same exact int32 sums. The floating-point code (int8_linear.cpp, FloatMath) takes the
// same steps in the same order on all of them. So results are bit-identical everywhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "numerics.h"

namespace owlet {

// Packed weights on a CPU are uint8 (ceil(N/64), ceil(K/4), 64, 4): panels of 64 rows, in which 4 consecutive k of a
// row (a quad) are adjacent. That is the operand shape of vpdpbusd, tdpbsud, sdot and dp4a, and a panel is read from
// front to back. A value is stored as w + 128, because vpdpbusd needs one unsigned operand. Padding is 128, a zero.
// See docs/log.md, "Panels".
constexpr int kPanelRows = 64;
constexpr int kQuadBytes = 4 * kPanelRows;  // one quad of every row of a panel

// Packed weights on a GPU are int8 (ceil(N/8), ceil(K/64), 8, 64), zero past N and K. A tile of 8 rows x 64 k is 512
// contiguous bytes: one load of a warp takes a tile and gives each lane its operands of the tensor cores.
constexpr int kTileRows = 8, kTileK = 64, kTileBytes = kTileRows * kTileK;

// The activations of a token start on a cache line: loading a tile register from elsewhere takes ten times as long.
constexpr int kLine = 64;
constexpr int64_t row_bytes(int64_t quads) { return (4 * quads + kLine - 1) / kLine * kLine; }

inline int32_t load_quad(const int8_t* q) {
  int32_t quad;
  std::memcpy(&quad, q, 4);
  return quad;
}

// Kernels sum q * (w + 128), starting from -128 * sum(q), so no partial sum exceeds 128 * 127 * K.
constexpr int64_t kMaxK = INT32_MAX / (128 * 127);

// acc[t * 64 + n] = sum over k of q[t, k] * w[n, k]. q is (tokens, row_bytes(quads)); q_sum[t] is the sum of q[t, k]
// over k.
using DotPanel = void(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int32_t* acc);

// ---- fp32 operations between the products
// Sums use sixteen lanes on every CPU, whatever the width of its registers, and each step is one fused multiply-add. So
// every instruction set gives the same bits.

constexpr int kQueries = 32;  // the most that one attend_block takes (docs/log.md, "Blocks of attention")

struct FloatMath {
  // y = x / rms(x) * weight, each (size); y may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t size, float eps, float* y);
  // Rotates the pairs (x[i], x[i + half]) by one position's angles: cos, sin (half).
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);
  // y (count, size) = q * scales, with one scale per row.
  void (*dequantize)(const int8_t* q, const float* scales, int64_t count, int64_t size, float* y);
  // softmax(q K^T / sqrt(size)) V of one head: q (size), keys and values (count, size) -> y (size). Scales: one per row
  // of int8, null for floats. next: the address that will be read after the values, for prefetching.
  template <typename T>
  using Attend = void(const float* q, const T* keys, const float* key_scales, const T* values,
                      const float* value_scales, int64_t count, int64_t size, float* scratch, float* y,
                      const void* next);
  Attend<float>* attend;
  Attend<int8_t>* attend_int8;
  // attend for up to kQueries queries, q_stride apart, at positions pos, pos + 1, ...: each sees the keys up to its own
  // position. The results are y_stride apart.
  void (*attend_block)(const float* q, int64_t q_stride, int64_t queries, int64_t pos, const float* keys,
                       const float* values, int64_t size, float* scratch, float* y, int64_t y_stride);
};

// The size of scratch, in floats, for attend and attend_block.
inline int64_t attention_scratch(int64_t keys, int64_t size) { return kQueries * (keys + 2 * size); }

extern const FloatMath avx512_math, fma_math;  // x86-64
extern const FloatMath neon_math;              // 64-bit Arm
extern const FloatMath wasm_math;              // WebAssembly
extern const FloatMath generic_math;

// ---- instruction sets

constexpr int kMaxTileTokens = 32;  // docs/log.md, "Tokens per kernel call"

// A way to read the weights for one token, which is bound by memory. The best differs from machine to machine.
struct Variant {
  const char* name;  // "streams x bytes prefetched ahead, into which cache"
  DotPanel* dot_panel;
};

struct Kernel {
  const char* name;
  bool (*supported)();  // by this CPU and its operating system
  const FloatMath* floats;
  int tile_tokens;                      // the most tokens of a call: one load of the weights serves all of them
  DotPanel* dot_panel[kMaxTileTokens];  // [tokens - 1]; [0] is the first of the variants
  const Variant* variants;              // for one token, up to one that is null
};

extern const Kernel amx, avx512_vnni, avx_vnni, avx2;  // x86-64
extern const Kernel neon;                              // 64-bit Arm
extern const Kernel wasm;                              // WebAssembly
extern const Kernel generic;
extern const Variant avx512_variants[];

const Kernel& kernel();                    // the one in use: $OWLET_ISA, or else the best this CPU supports
std::vector<std::string> kernel_names();   // the kernels this CPU supports, best first
void use_kernel(const std::string& name);  // switches, for tests; not while another thread computes

const Variant& variant();                   // of kernel(), in use: $OWLET_KERNEL, or what use_variant set, or the first
std::vector<std::string> variant_names();   // of kernel()
void use_variant(const std::string& name);  // not while another thread computes

// Packs panels [panel_begin, panel_end) of w, int8 (N, K) row-major. Returns false if w holds a -128, which the
// symmetric format does not have.
bool pack_panels(const int8_t* w, int64_t N, int64_t K, int64_t panel_begin, int64_t panel_end, uint8_t* packed);

struct QuantizedRow {
  float scale;  // x = q * scale; NaN if x is not finite
  int32_t sum;  // of q
};

QuantizedRow quantize_row(const float* x, int64_t K, int8_t* q);

// Activations in int8. Only the constructor allocates.
class QuantizedTokens {
 public:
  QuantizedTokens(int64_t tokens, int64_t K);
  // Quantizes x, float (K), as token t.
  void quantize(int64_t t, const float* x);
  struct Free {
    void operator()(int8_t* p) const { operator delete[](p, std::align_val_t(kLine)); }
  };

  const int64_t K, quads;
  const std::unique_ptr<int8_t[], Free> q;  // (tokens, row_bytes(quads)), zero past K
  const std::unique_ptr<float[]> scale;     // (tokens)
  const std::unique_ptr<int32_t[]> q_sum;   // (tokens)
};

enum class Activation { none, silu, swiglu };

template <typename Packed>
struct LinearOf {
  int64_t N, K;
  const Packed* packed;
  const float* scale;  // (N)
  const float* bias;   // (N) or null
  // swiglu: rows of w alternate gate and up, and y has N / 2 columns: silu(gate) * up.
  Activation activation;
  OWLET_HOST_DEVICE int64_t columns() const { return activation == Activation::swiglu ? N / 2 : N; }
};

struct Int8Linear : LinearOf<uint8_t> {
  // The number of parallel tasks. Each is one panel for a block of tokens.
  int64_t tasks(int64_t tokens) const;
  // Computes tasks [begin, end) of y, float (tokens, columns), for the first `tokens` of x. residual has y's shape, may
  // be y itself, and may be null.
  void forward(const QuantizedTokens& x, int64_t tokens, const float* residual, int64_t begin, int64_t end,
               float* y) const;
  // y (K) = row n of the matrix, times its scale.
  void read_row(int64_t n, float* y) const;
};

}  // namespace owlet
