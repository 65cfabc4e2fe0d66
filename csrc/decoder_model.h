// The weights of a decoder, on a CPU or a GPU: pointers into tensors that the caller keeps alive. Norm weights and
// tables are float; Linear is an int8 matrix.
#pragma once

#include <cstdint>
#include <vector>

namespace owlet {

template <typename Linear>
struct DecoderBlockOf {
  const float* input_norm;  // (n_embd)
  Linear qkv;               // (n_head + 2 n_kv_head) * head_dim rows: q, k, v
  const float* q_norm;      // (head_dim), or null without QK-norm
  const float* k_norm;
  Linear o;
  const float* post_norm;  // (n_embd)
  Linear gate_up;          // swiglu: 2 n_hidden rows
  Linear down;
};

template <typename Linear>
struct DecoderModelOf {
  int64_t n_embd, n_head, n_kv_head, head_dim, n_hidden;
  float norm_eps;
  const float *cos, *sin;  // (block_size, head_dim / 2)
  Linear embedding;        // (vocab_size, n_embd), read by rows
  std::vector<DecoderBlockOf<Linear>> blocks;
  const float* norm;  // (n_embd)
  Linear head;        // (vocab_size, n_embd)
};

}  // namespace owlet
