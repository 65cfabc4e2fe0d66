// The forward pass of model.py with int8 products and an int8 cache, without torch: one parallel region computes all
// tokens of a batch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "layout.h"

namespace owlet {

using DecoderBlock = DecoderBlockOf<Int8Linear>;
using DecoderModel = DecoderModelOf<Int8Linear>;

struct CpuLayout {  // the base of a Source of read_model
  using Linear = Int8Linear;
  static constexpr int64_t kHeadDimStep = 2, kMaxHeadDim = kMaxK;
  static constexpr const char* kHeadDims = "even";
};

// Keys and values of one head of one sequence, in int8 with one scale per position. Both lie in panels, as the weights
// of a product do. So attention's scores are a product by the keys, and its results one by the values.
struct HeadCache {
  int64_t length;                    // a multiple of kPanelRows
  uint8_t *keys, *values;            // (length, head_dim) and (head_dim, length), packed
  float *key_scales, *value_scales;  // (length)
};

class Cache {
 public:
  Cache(const DecoderModel& model, int64_t batch, int64_t length);
  HeadCache head(int64_t layer, int64_t b, int64_t kv_head);
  const int64_t batch, length, padded;  // padded: to whole panels

 private:
  const int64_t n_kv_head_, head_dim_;
  struct alignas(kLine) Line {  // for loads of whole lines, as of the weights
    uint8_t bytes[kLine];
  };
  std::vector<Line> keys_, values_;
  std::vector<float> key_scales_, value_scales_;
};

// The work of one call: for each sequence of the batch, the logits after its last token.
struct Step {
  const int64_t* tokens;  // (batch, stride): the first `count` of each row are used
  int64_t batch, count, stride;
  int64_t pos;  // the first token's position: the cache holds those before it
  Cache* cache;
  float* logits;     // (batch, vocab_size), or null to fill the cache only
  bool all = false;  // logits after every token, (batch, count, vocab_size), bit for bit those of one token per call. A
                     // batch of more than one sequence has at most kMaxRows tokens then.
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
  std::string kernel() const;  // the instruction set, and how it reads the weights for one token
  const DecoderModel model;

 private:
  struct Rows;
  struct Thread;  // a thread's own buffers
  class Pass;     // a thread's part of a step
  class Barrier;
  class Team;
  void choose_variant(const Step& step, int threads);
  void run(const Step& step, int threads);
  void prepare(const Step& step, int threads);

  int64_t rows_ = 0;             // tokens that the buffers have room for
  std::vector<float> x_;         // (rows, n_embd): the residual stream
  std::vector<float> qkv_;       // (rows, n_head + 2 n_kv_head, head_dim)
  std::vector<float> attn_out_;  // (rows, n_head, head_dim)
  std::vector<float> hidden_;    // (rows, n_hidden)
  std::vector<float> logits_;    // (2 rows, vocab_size): of a fine head
  std::unique_ptr<Rows> quantized_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::unique_ptr<Team> team_;
  Choice choice_;
  std::vector<double> seconds_;  // the times of the first tokens; the variants alternate
  int timed_for_ = 0;            // the number of threads that the times are of
};

}  // namespace owlet
