// The entry points of csrc/cuda for ctypes.
#include "../../csrc/cuda/decoder.h"
#include "../../csrc/cuda/primitives.cuh"

using namespace owlet;

namespace {

template <typename T>
void linear(const void* x, int64_t tokens, int64_t K, const float* norm, float eps, const int8_t* packed, int64_t N,
            const float* scale, const float* bias, int activation, const void* residual, void* y) {
  std::vector<int8_t> q(cuda::scratch_bytes(tokens, K));
  std::vector<float> x_scale(tokens);
  cuda::int8_linear<T>({static_cast<const T*>(x), tokens, norm, eps},
                       {N, K, packed, scale, bias, static_cast<Activation>(activation)},
                       static_cast<const T*>(residual), static_cast<T*>(y), {q.data(), x_scale.data()}, nullptr);
}

}  // namespace

extern "C" {

void int8_linear(int bits, const void* x, int64_t tokens, int64_t K, const float* norm, float eps,
                 const int8_t* packed, int64_t N, const float* scale, const float* bias, int activation,
                 const void* residual, void* y) {
  const auto function = bits == 32 ? linear<float> : bits == 16 ? linear<__half> : linear<__nv_bfloat16>;
  function(x, tokens, K, norm, eps, packed, N, scale, bias, activation, residual, y);
}

// tensors: cos, sin, embedding, norm, head; then input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up, down of each
// layer. A matrix is two tensors: packed, scale.
void decode(int64_t n_embd, int64_t n_head, int64_t n_kv_head, int64_t head_dim, int64_t n_hidden, int64_t vocab_size,
            int64_t n_layer, float eps, const void* const* tensors, const int64_t* tokens, const int64_t* pos,
            int64_t batch, float* keys, float* values, int64_t length, float* logits) {
  const auto vector = [&] { return static_cast<const float*>(*tensors++); };
  const auto matrix = [&](int64_t N, int64_t K, Activation activation = Activation::none) {
    const auto* packed = static_cast<const int8_t*>(*tensors++);
    return cuda::Linear{N, K, packed, vector(), nullptr, activation};
  };
  const int64_t width = n_head * head_dim, qkv_width = width + 2 * n_kv_head * head_dim;
  cuda::DecoderModel model{n_embd, n_head, n_kv_head, head_dim, n_hidden, eps, vector(), vector(),
                           matrix(vocab_size, n_embd), {}, vector(), matrix(vocab_size, n_embd), false};
  for (int64_t i = 0; i < n_layer; ++i)
    model.blocks.push_back({vector(), matrix(qkv_width, n_embd), vector(), vector(), matrix(n_embd, width), vector(),
                            matrix(2 * n_hidden, n_embd, Activation::swiglu), {matrix(n_embd, n_hidden)}});
  const int64_t widest = std::max({n_embd, width, n_hidden});
  std::vector<float> x(batch * n_embd), qkv(batch * qkv_width), attn_out(batch * width),
      hidden(batch * n_hidden), scale(batch);
  std::vector<int8_t> q(cuda::scratch_bytes(batch, widest));
  if (cuda::decode(model, {tokens, pos, batch, keys, values, length, logits},
                   {x.data(), qkv.data(), attn_out.data(), hidden.data(), {q.data(), scale.data()}},
                   nullptr) != cudaSuccess)
    std::abort();
}
}
