// The forward pass of model.py with int8 products, free of torch: all tokens that come at once, for
// every stream, in one parallel region.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "decoder_model.h"
#include "kernels/kernels.h"

namespace owlet {

using DecoderBlock = DecoderBlockOf<Int8Linear>;
using DecoderModel = DecoderModelOf<Int8Linear>;

// Keys or values of all layers and streams: (n_layer, streams, n_kv_head, length, head_dim), either
// float, or int8 with a float scale for each row of head_dim.
struct Cache {
  float* floats;
  int8_t* int8;   // null: floats
  float* scales;  // (n_layer, streams, n_kv_head, length)
};

// What one call computes: for each stream the logits that follow its last token.
struct Step {
  const int64_t* tokens;  // (streams, stride), of which the first `count` of each stream
  int64_t streams, count, stride;
  int64_t pos;  // of the first: the caches hold the positions before, and these are added
  Cache keys, values;
  int64_t length;  // of the caches
  float* logits;   // (streams, vocab_size), or null: fill the caches, and no more
};

class Decoder {
 public:
  explicit Decoder(DecoderModel model);
  ~Decoder();

  // Not to be called by two threads at once.
  void forward(Step step, int threads);

 private:
  struct Rows;
  struct Thread;  // what each thread has for itself
  class Barrier;

  void prepare(const Step& step, int threads);
  void run(const Step& step, Thread& thread, Barrier& barrier, int index, int threads);
  void append(const Step& step, const DecoderBlock& block, int64_t layer, int64_t row, int64_t kv_head);
  void attend_last(const Step& step, Thread& thread, int64_t layer, int64_t stream, int64_t kv_head);
  void attend_block(const Step& step, Thread& thread, int64_t layer, int64_t stream, int64_t head, int64_t first);
  int64_t cache_row(const Step& step, int64_t layer, int64_t stream, int64_t kv_head) const;

  const DecoderModel model_;
  int64_t rows_ = 0;           // tokens that there is room for
  std::vector<float> x_;       // (rows, n_embd): the residual stream
  std::vector<float> qkv_;     // (rows, n_head + 2 n_kv_head, head_dim)
  std::vector<float> mixed_;   // (rows, n_head, head_dim): attention's output
  std::vector<float> hidden_;  // (rows, n_hidden)
  std::unique_ptr<Rows> quantized_;
  std::vector<std::unique_ptr<Thread>> threads_;
};

}  // namespace owlet
