// Text from a model, without torch: the sampler, and speculative decoding that does not change the text.
//
// A pass over several tokens takes little longer than one over a single token, since the weights are read once. So
// tokens are guessed and checked together (Leviathan et al., 2023): by a smaller model, or from what followed the same
// tokens earlier (Saxena, 2023). The random numbers of a token follow from (seed, row, position) alone and serve guess
// and check. A guess is right if it is the very token that the model draws.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "decoder.h"

namespace owlet {

struct Sampling {
  float temperature;         // 0: the likeliest token
  int64_t top_k;             // 0: all tokens
  double top_p;              // 1: all tokens
  float repetition_penalty;  // 1: none
  uint64_t seed;
};

class Sampler {
 public:
  Sampler(const Sampling& settings, int64_t vocab_size) : settings_(settings), x_(vocab_size), seen_at_(vocab_size) {}
  // The token at `pos` of text `row`: logits (vocab_size); seen (count): tokens to penalise. -1: the largest logit is
  // not finite.
  int64_t draw(const float* logits, const int64_t* seen, int64_t count, uint64_t row, uint64_t pos);

 private:
  float least_kept();
  const Sampling settings_;
  std::vector<float> x_, sorted_;
  std::vector<int64_t> seen_at_;  // the call of draw that penalised a token last
  int64_t call_ = 0;
};

// A model with a cache, which holds the tokens [start, start + known) of the texts.
struct CachedModel {
  Decoder* decoder;
  Cache* cache;
  int64_t start = 0, known = 0;
};

class Writer {
 public:
  Writer(const Writer&) = delete;  // models_ points into it
  // Continues tokens (batch, stride). A text ends with one of `stops`, and repeats the first of them.
  Writer(CachedModel model, std::optional<CachedModel> draft, const Sampling& sampling, std::vector<int64_t> stops,
         int64_t most_guesses, int64_t* tokens, int64_t batch, int64_t stride);
  // Adds tokens at [end, limit), at least one; starts no pass after `seconds`. Returns the new end; -1: the logits were
  // not finite.
  int64_t write(int64_t end, int64_t limit, double seconds, int threads);
  bool ended() const { return done_count_ == batch_; }
  int64_t guessed = 0, right = 0;

 private:
  static constexpr int64_t kMost = 8;  // guesses in a pass
  // How many guesses of a source to check in a pass: twice as many after all were right, half after one was wrong. With
  // none left, it is asked again after a while, which doubles each time.
  struct Source {
    int64_t count = 1, wait = 0, pause = 8;
    int64_t take();
    void checked(int64_t count, int64_t right);
  };

  int64_t step(int64_t end, int64_t limit, int threads);
  std::pair<int64_t, Source*> guess(int64_t end, int64_t room, int threads);
  void run_model(CachedModel& model, int64_t end, bool all, int threads);
  int64_t draw(int64_t b, const float* logits, int64_t pos, bool guess = false);
  std::pair<int64_t, int64_t> earlier(const int64_t* text, int64_t end) const;
  int64_t* text(int64_t b) const { return tokens_ + b * stride_; }

  CachedModel model_;
  std::optional<CachedModel> draft_;
  std::vector<CachedModel*> models_{&model_};  // and the draft
  Sampler sampler_;
  const int64_t vocab_size_, most_guesses_;
  const std::vector<int64_t> stops_;
  int64_t* const tokens_;
  const int64_t batch_, stride_;
  std::vector<float> logits_;  // (batch, 1 + most_guesses, vocab_size)
  std::vector<bool> done_;
  int64_t done_count_ = 0;
  Source of_draft_, of_text_;
};

}  // namespace owlet
