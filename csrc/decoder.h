// The forward pass of model.py with int8 products, without torch: one parallel region computes all tokens of a batch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"

namespace owlet {

// The weights, on a CPU or a GPU: pointers into tensors that the caller keeps alive. Norm weights and tables are float;
// Linear is an int8 matrix.
template <typename Linear>
struct DecoderBlockOf {
  const float* input_norm;  // (n_embd)
  Linear qkv;               // (n_head + 2 n_kv_head) * head_dim rows: q, k, v
  const float* q_norm;      // (head_dim), or null without QK-norm
  const float* k_norm;
  Linear o;
  const float* post_norm;  // (n_embd)
  Linear gate_up;          // swiglu: 2 n_hidden rows
  std::vector<Linear> down;  // one for each slice of the n_hidden channels; their results add up. On a GPU, one.
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
  bool fine_head;     // takes x in int8, and what that leaves of x in int8 again (FineLinear in int8.py); CPU only
};

using DecoderBlock = DecoderBlockOf<Int8Linear>;
using DecoderModel = DecoderModelOf<Int8Linear>;

// The keys or the values of all layers: (n_layer, batch, n_kv_head, length, head_dim), as floats or as int8 with one
// float scale per row of head_dim.
struct Cache {
  float* floats;
  int8_t* int8;   // null if the cache is in floats
  float* scales;  // (n_layer, batch, n_kv_head, length)
};

// The work of one call: for each sequence of the batch, the logits after its last token.
struct Step {
  const int64_t* tokens;  // (batch, stride): the first `count` of each row are used
  int64_t batch, count, stride;
  int64_t pos;  // of the first token: the caches hold the positions before it, and these are added
  Cache keys, values;
  int64_t length;  // of the caches
  float* logits;   // (batch, vocab_size), or null to fill the caches only
  bool all = false;  // logits after every token, (batch, count, vocab_size), with the bits of one token at a time; for at
                     // most kMaxRows rows
};

class Decoder {
 public:
  explicit Decoder(DecoderModel model);
  ~Decoder();
  // The most tokens that go through the model together (but at least one of each sequence). More tokens read the
  // weights less often; fewer keep the activations between two products in the cache (docs/log.md, "Rows per pass").
  static constexpr int64_t kMaxRows = 256;
  // Two threads must not call this at once.
  void forward(Step step, int threads);

 private:
  struct Rows;
  struct Thread;  // a thread's own buffers
  class Barrier;
  class Team;
  void choose_variant(const Step& step, int threads);
  void run_all(const Step& step, int threads);
  void prepare(const Step& step, int threads);
  void run(const Step& step, Thread& thread, Barrier& barrier, int index, int threads);
  void append(const Step& step, const DecoderBlock& block, int64_t layer, int64_t row, int64_t kv_head);
  void attend(const Step& step, Thread& thread, int64_t layer, int64_t row, int64_t kv_head, int64_t out);
  void attend_block(const Step& step, Thread& thread, int64_t layer, int64_t b, int64_t head, int64_t first);
  int64_t cache_row(const Step& step, int64_t layer, int64_t b, int64_t kv_head) const;

  const DecoderModel model_;
  int64_t rows_ = 0;             // tokens that the buffers have room for
  std::vector<float> x_;         // (rows, n_embd): the residual stream
  std::vector<float> qkv_;       // (rows, n_head + 2 n_kv_head, head_dim)
  std::vector<float> attn_out_;  // (rows, n_head, head_dim)
  std::vector<float> hidden_;    // (rows, n_hidden)
  std::vector<float> logits_;    // (2 rows, vocab_size): of a fine head
  std::unique_ptr<Rows> quantized_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::unique_ptr<Team> team_;
  // for choose_variant
  std::vector<double> seconds_;         // of the first tokens
  size_t trials_ = 0;                   // how many of them are to be timed
  size_t fastest_ = 0;                  // of the variants
  int chosen_for_ = 0;                  // threads
  const Variant* chosen_of_ = nullptr;  // the kernel's
};

}  // namespace owlet
