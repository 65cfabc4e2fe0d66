// The int8 kernels, without torch:  y = activation(x @ w.T) + residual
//
// x is quantized to int8 with one scale per token (row of x); w is int8 with one scale per output channel. Every
// instruction set computes the same exact int32 sums. All floating-point code (linear.cpp, floats.h) is plain C++
// that takes the same steps in the same order everywhere. So results are bit-identical.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "numerics.h"

// Compiles a function for wider vectors too; the loader chooses one. (Its choice comes before ThreadSanitizer is ready.)
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

namespace owlet {

// ---- layouts

// Packed weights on a CPU are uint8 (ceil(N/64), ceil(K/4), 64, 4): panels of 64 rows, in which 4 consecutive k of a
// row (a quad) are adjacent. That is the operand shape of vpdpbusd, tdpbsud and sdot, and a panel is read from front to
// back. A value is stored as w + 128, because vpdpbusd needs one unsigned operand. Padding is 128, a zero.
// See docs/log.md, "Panels".
constexpr int kPanelRows = 64;
constexpr int kQuadBytes = 4 * kPanelRows;  // one quad of every row of a panel
constexpr int64_t panel_bytes(int64_t K) { return ceil_div(K, 4) * kQuadBytes; }
constexpr int64_t packed_bytes(int64_t N, int64_t K) { return ceil_div(N, kPanelRows) * panel_bytes(K); }
// Where w[n, k] lies.
constexpr int64_t packed_at(int64_t n, int64_t k, int64_t K) {
  return n / kPanelRows * panel_bytes(K) + k / 4 * kQuadBytes + n % kPanelRows * 4 + k % 4;
}

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

// ---- instruction sets

// acc[t * 64 + n] = sum over k of q[t, k] * w[n, k], computed for at least the first `rows` n. q is (tokens,
// row_bytes(quads)); q_sum[t] is the sum of q[t, k] over k.
using DotPanel = void(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int rows, int32_t* acc);

constexpr int kMaxTileTokens = 32;  // docs/log.md, "Tokens per kernel call"

// A kernel for one token, which memory bandwidth limits. Which is the fastest differs from machine to machine.
struct Variant {
  const char* name;  // "streams x bytes prefetched ahead, into which cache"
  DotPanel* dot_panel;
};

struct Kernel {
  const char* name;
  bool (*supported)();                  // whether this CPU and its operating system run it
  int max_tokens;                       // the most tokens of a call: one load of the weights serves all of them
  DotPanel* dot_panel[kMaxTileTokens];  // [tokens - 1]
  const Variant* one_token = nullptr;   // kernels for one token; null: dot_panel[0]
  size_t variants = 0;                  // the number of them
};

extern const Kernel amx, avx512_vnni, avx_vnni, avx2;  // x86-64
extern const Kernel neon;                              // 64-bit Arm
extern const Kernel wasm;                              // WebAssembly
extern const Kernel generic;
extern const Variant avx512_one_token[3];

const Kernel& kernel();                   // the best that this CPU supports, or $OWLET_ISA
std::vector<std::string> kernel_names();  // those that this CPU supports, best first

// A kernel and one of its variants.
struct Choice {
  const Kernel* kernel;
  size_t variant = 0;

  // Computes the sums of `tokens` rows of q and one panel, in groups of about equal size. Calls
  // then(first token, tokens of the group, acc) for each.
  template <typename Then>
  void multiply(const int8_t* q, const int32_t* q_sum, int64_t tokens, const uint8_t* panel, int64_t quads, int rows,
                Then then) const {
    for (int64_t t = 0, count; t < tokens; t += count) {
      count = ceil_div(tokens - t, ceil_div(tokens - t, kernel->max_tokens));
      alignas(kLine) int32_t acc[kMaxTileTokens * kPanelRows];
      (count == 1 && kernel->variants ? kernel->one_token[variant].dot_panel : kernel->dot_panel[count - 1])(
          q + t * row_bytes(quads), q_sum + t, panel, quads, rows, acc);
      then(t, count, acc);
    }
  }
};

// ---- products

// Packs panels [panel_begin, panel_end) of w, int8 (N, K) row-major. Returns false if w holds a -128, which the
// symmetric format does not have.
bool pack_panels(const int8_t* w, int64_t N, int64_t K, int64_t panel_begin, int64_t panel_end, uint8_t* packed);

// Activations in int8. Only the constructor allocates.
class QuantizedTokens {
 public:
  QuantizedTokens(int64_t tokens, int64_t K);
  // Quantizes rows of x, float (K), `stride` apart, as tokens t, t + 1, ... A row with a NaN or infinity gets the scale
  // NaN.
  void quantize(int64_t t, const float* x, int64_t count = 1, int64_t stride = 0);
  struct Free {
    void operator()(int8_t* p) const { operator delete[](p, std::align_val_t(kLine)); }
  };

  const int64_t K, quads;
  const std::unique_ptr<int8_t[], Free> q;  // (tokens, row_bytes(quads)), zero past K
  const std::unique_ptr<float[]> scale;     // (tokens): x = q * scale
  const std::unique_ptr<int32_t[]> q_sum;   // (tokens)
};

enum class Activation { none, swiglu };

template <typename Packed>
struct LinearOf {
  int64_t N, K;
  const Packed* packed;
  const float* scale;  // (N)
  // swiglu: rows of w alternate gate and up, and y has N / 2 columns: silu(gate) * up.
  Activation activation;
  OWLET_HOST_DEVICE int64_t columns() const { return activation == Activation::swiglu ? N / 2 : N; }
};

struct Int8Linear : LinearOf<uint8_t> {
  // The number of parallel tasks. Each is one panel for a block of tokens.
  int64_t tasks(int64_t tokens) const;
  // Computes tasks [begin, end) of y, float (tokens, columns), for the first `tokens` of x. residual has y's shape, may
  // be y itself, and may be null.
  void forward(const Choice& choice, const QuantizedTokens& x, int64_t tokens, const float* residual, int64_t begin,
               int64_t end, float* y) const;
  // y (K) = row n of the matrix, times its scale.
  void read_row(int64_t n, float* y) const;
};

}  // namespace owlet
