// One token through the whole model, free of torch: the forward pass of model.py with int8 products,
// in one parallel region.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"

namespace owlet {

// Pointers into tensors that somebody else keeps alive. Norm weights and tables are float.
struct DecoderBlock {
  const float* input_norm;  // (n_embd)
  Int8Linear qkv;           // (n_head + 2 n_kv_head) * head_dim rows: q, k, v
  const float* q_norm;      // (head_dim), or null: no QK-norm
  const float* k_norm;
  Int8Linear o;
  const float* post_norm;  // (n_embd)
  Int8Linear gate_up;      // swiglu: 2 n_hidden rows
  Int8Linear down;
};

struct DecoderModel {
  int64_t n_embd, n_head, n_kv_head, head_dim, n_hidden;
  float norm_eps;
  const float *cos, *sin;  // (block_size, head_dim / 2)
  Int8Linear embedding;    // (vocab_size, n_embd), of which rows are read
  std::vector<DecoderBlock> blocks;
  const float* norm;  // (n_embd)
  Int8Linear head;    // (vocab_size, n_embd)
};

class Decoder {
 public:
  explicit Decoder(DecoderModel model);
  ~Decoder();

  // The logits, float (vocab_size), that follow `token` at position `pos`. keys and values, float
  // (n_layer, n_kv_head, length, head_dim), hold positions before pos; this one's are added.
  // Not to be called by two threads at once.
  void forward(int64_t token, int64_t pos, float* keys, float* values, int64_t length, int threads,
               float* logits);

 private:
  struct Thread;   // what each thread has for itself
  class Barrier;

  void run(Thread& thread, Barrier& barrier, int index, int threads, int64_t token, int64_t pos,
           float* keys, float* values, int64_t length, float* logits);
  void attend(Thread& thread, const DecoderBlock& block, int64_t kv_head, int64_t pos, float* keys,
              float* values);

  const DecoderModel model_;
  std::vector<float> x_;       // (n_embd): the residual stream
  std::vector<float> qkv_;     // (n_head + 2 n_kv_head, head_dim)
  std::vector<float> mixed_;   // (n_head, head_dim): attention's output
  std::vector<float> hidden_;  // (n_hidden)
  std::vector<std::unique_ptr<Thread>> threads_;
};

}  // namespace owlet
