// The entry points of csrc/cuda for ctypes.
#include "../../csrc/cuda/decoder.h"
#include "../../csrc/cuda/primitives.cuh"

using namespace owlet;

namespace {

// The arrays of int8.py's list, whose matrices are in tiles.
struct Arrays {
  using Linear = cuda::Linear;
  static constexpr int64_t kHeadDimStep = cuda::kHeadDimStep, kMaxHeadDim = cuda::kMaxHeadDim;
  static constexpr const char* kHeadDims = "";
  const void* const* next;
  float number(const char*) { return *static_cast<const float*>(*next++); }
  const float* floats(const char*, int64_t, int64_t) { return static_cast<const float*>(*next++); }
  Linear matrix(const char* name, int64_t N, int64_t K) {
    const auto* packed = static_cast<const int8_t*>(*next++);
    return {N, K, packed, floats(name, 1, N), Activation::none};
  }
  void require(bool condition, const char*, const char*, int64_t) {
    if (!condition) std::abort();
  }
};

}  // namespace

extern "C" {

void int8_linear(const float* x, int64_t tokens, int64_t K, const float* norm, float eps, const int8_t* packed, int64_t N,
                 const float* scale, int swiglu, const float* residual, float* y) {
  std::vector<int8_t> q(cuda::scratch_bytes(tokens, K));
  std::vector<float> x_scale(tokens);
  cuda::int8_linear({x, tokens, norm, eps}, {N, K, packed, scale, swiglu ? Activation::swiglu : Activation::none},
                    residual, y, {q.data(), x_scale.data()}, nullptr);
}

void decode(const void* const* arrays, const int64_t* tokens, const int64_t* pos, int64_t batch, int8_t* keys,
            int8_t* values, float* key_scales, float* value_scales, int64_t length, float* logits) {
  Arrays source{arrays + 1};
  const auto model = read_model(source, *static_cast<const Sizes*>(arrays[0]));
  const int64_t widest = std::max({model.n_embd, model.width(), model.n_hidden});
  std::vector<float> x(batch * model.n_embd), qkv(batch * model.qkv_width()), attn_out(batch * model.width()),
      hidden(batch * model.n_hidden), scale(batch);
  std::vector<int8_t> q(cuda::scratch_bytes(batch, widest));
  if (cuda::decode(model, {tokens, pos, batch, keys, values, key_scales, value_scales, length, logits},
                   {x.data(), qkv.data(), attn_out.data(), hidden.data(), {q.data(), scale.data()}},
                   nullptr) != cudaSuccess)
    std::abort();
}
}
