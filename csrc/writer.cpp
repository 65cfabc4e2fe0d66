#include "writer.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>

namespace owlet {
namespace {

uint64_t mix(uint64_t z) {  // splitmix64 (Steele et al., 2014)
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

uint32_t random_bits(uint64_t key, uint32_t token) {  // murmur3's finalizer, keyed twice
  uint32_t x = (token + 1) * 0x9e3779b9u ^ static_cast<uint32_t>(key);
  x = (x ^ x >> 16) * 0x85ebca6bu + static_cast<uint32_t>(key >> 32);
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// [n] = 2^32 e^-n. If ~bits is at least this, the Gumbel number of `bits` is at most n.
std::array<uint64_t, 24> gumbel_bounds() {
  std::array<uint64_t, 24> bounds;
  for (size_t n = 0; n < bounds.size(); ++n) bounds[n] = static_cast<uint64_t>(0x1p32 * std::exp(-1.0 * n)) + 1;
  return bounds;
}

constexpr int64_t kLongest = 15, kShortest = 3;  // equal tokens that a guess from the text follows

}  // namespace

// sample_next of generate.py is the same function. Of the tokens kept, that with the largest sum of log probability and
// Gumbel number is drawn (Gumbel, 1954), which needs no normalised probabilities. The logarithms are taken for the few
// whose random bits are large enough. They are the library's, in double precision: their last bit may differ from one
// machine to another, but hardly ever decides.
int64_t Sampler::draw(const float* logits, const int64_t* seen, int64_t count, uint64_t row, uint64_t pos) {
  static const auto bounds = gumbel_bounds();
  const int64_t V = x_.size();
  std::copy_n(logits, V, x_.data());
  if (settings_.repetition_penalty != 1) {
    ++call_;
    for (int64_t i = 0; i < count; ++i) {
      if (std::exchange(seen_at_[seen[i]], call_) == call_) continue;
      float& x = x_[seen[i]];
      x = x > 0 ? x / settings_.repetition_penalty : x * settings_.repetition_penalty;
    }
  }
  // A NaN counts as the largest.
  const auto less = [](float a, float b) { return a < b || (std::isnan(b) && !std::isnan(a)); };
  int64_t best = std::max_element(x_.begin(), x_.end(), less) - x_.begin();
  const float top = x_[best];
  if (!std::isfinite(top)) return -1;
  if (settings_.temperature == 0) return best;
  for (float& x : x_) x = (x - top) / settings_.temperature;
  const float least = least_kept();
  const uint64_t key = mix(mix(mix(settings_.seed) + row) + pos);
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < V; ++i) {
    if (!(x_[i] >= least)) continue;
    const double lead = most - x_[i];
    if (lead >= bounds.size()) continue;
    const uint32_t bits = random_bits(key, i);
    if (lead >= 0 && ~bits >= bounds[static_cast<int>(lead)]) continue;
    const double gumbel = -std::log(-std::log((bits + 0.5) * 0x1p-32));
    if (x_[i] + gumbel > most) most = x_[i] + gumbel, best = i;
  }
  return best;
}

// The smallest of x_ that top-k and top-p keep. Tokens as likely as that one are kept too.
float Sampler::least_kept() {
  const int64_t V = x_.size(), k = settings_.top_k && settings_.top_k < V ? settings_.top_k : V;
  if (k == V && settings_.top_p >= 1) return -std::numeric_limits<float>::infinity();
  sorted_ = x_;
  if (k < V) {
    std::nth_element(sorted_.begin(), sorted_.begin() + k - 1, sorted_.end(), std::greater<>());
    sorted_.resize(k);
  }
  if (settings_.top_p >= 1) return sorted_.back();
  double needed = 0;  // probability that is still to be kept
  for (const float x : sorted_) needed += settings_.top_p * std::exp(double{x});
  std::make_heap(sorted_.begin(), sorted_.end());
  float least = 0;
  for (auto end = sorted_.end(); end != sorted_.begin() && needed > 0; --end) {
    std::pop_heap(sorted_.begin(), end);
    least = end[-1];
    needed -= std::exp(double{least});
  }
  return least;
}

Writer::Writer(CachedModel model, std::optional<CachedModel> draft, const Sampling& sampling,
               std::vector<int64_t> stops, int64_t most_guesses, int64_t* tokens, int64_t batch, int64_t stride)
    : model_(model), draft_(draft), sampler_(sampling, model.decoder->model.vocab_size),
      vocab_size_(model.decoder->model.vocab_size),
      most_guesses_(std::max<int64_t>(0, std::min({most_guesses, kMost, Decoder::kMaxRows / batch - 1}))),
      stops_(std::move(stops)), tokens_(tokens), batch_(batch), stride_(stride),
      logits_(batch * (1 + most_guesses_) * vocab_size_), done_(batch) {
  if (draft_) models_.push_back(&*draft_);
}

int64_t Writer::write(int64_t end, int64_t limit, double seconds, int threads) {
  const auto stop = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  do {
    end = step(end, limit, threads);
  } while (0 < end && end < limit && !ended() && std::chrono::steady_clock::now() < stop);
  return end;
}

// One pass of the model: adds the guesses that are right, and the token after them. Returns the new end.
int64_t Writer::step(int64_t end, int64_t limit, int threads) {
  for (CachedModel* model : models_)  // past the context, each goes on with half of it
    if (const int64_t length = model->cache->length; end - model->start > length)
      model->start = end - std::max<int64_t>(1, length / 2), model->known = 0;
  const int64_t room = std::min({limit - end - 1, model_.start + model_.cache->length - end, most_guesses_});
  const bool prefill = model_.start + model_.known < end - 1;  // the cache lacks more than one token
  const auto [count, source] = prefill ? std::pair<int64_t, Source*>{} : guess(end, room, threads);
  run_model(model_, end + count, count > 0, threads);

  int64_t matched = -1;
  for (bool match = true; match && !ended();) {
    ++matched;
    for (int64_t b = 0; b < batch_; ++b) {
      int64_t& token = text(b)[end + matched];
      const int64_t drawn = draw(b, &logits_[(b * (count + 1) + matched) * vocab_size_], end + matched);
      if (drawn < 0) return drawn;
      match = match && matched < count && drawn == token;
      token = drawn;
    }
  }
  if (source) source->checked(count, std::min(matched, count));
  guessed += count, right += matched;
  end += matched + 1;
  for (CachedModel* model : models_)  // what was guessed wrong is forgotten
    model->known = std::min(model->known, end - 1 - model->start);
  return end;
}

// How many guesses to make now.
int64_t Writer::Source::take() {
  if (wait > 0) return --wait, 0;
  return count;
}

void Writer::Source::checked(int64_t guesses, int64_t right) {
  if (right == guesses) {
    count = std::min(kMost, 2 * guesses), pause = 1;
  } else if (guesses > 1) {
    count = guesses / 2;
  } else {
    wait = pause, pause = std::min<int64_t>(64, 2 * pause);
  }
}

// Writes guesses at `end`: how many, and from where.
std::pair<int64_t, Writer::Source*> Writer::guess(int64_t end, int64_t room, int threads) {
  if (room <= 0) return {};
  std::vector<int64_t> from(batch_);
  int64_t shortest = kLongest;
  for (int64_t b = 0, equal; b < batch_; ++b) {
    if (done_[b]) continue;
    std::tie(from[b], equal) = earlier(text(b), end);
    shortest = std::min(shortest, equal);
  }
  const int64_t of_text = shortest >= kShortest ? std::min(room, of_text_.take()) : 0;
  const int64_t draft_room = draft_ ? std::min(room, draft_->start + draft_->cache->length - end + 1) : 0;
  const int64_t of_draft = draft_room > 0 ? std::min(draft_room, of_draft_.take()) : 0;
  const bool drafts = of_draft > of_text;
  const int64_t count = std::max(of_draft, of_text);
  for (int64_t i = end; i < end + count; ++i) {
    if (drafts) run_model(*draft_, i, false, threads);
    for (int64_t b = 0; b < batch_; ++b) {
      const bool drawn = drafts || done_[b];
      text(b)[i] = drawn ? std::max<int64_t>(0, draw(b, &logits_[b * vocab_size_], i, true)) : text(b)[from[b] + i - end];
    }
  }
  if (count == 0) return {};
  return {count, drafts ? &of_draft_ : &of_text_};
}

// The token at pos of text b; a text that has ended repeats its end. A guess ends none.
int64_t Writer::draw(int64_t b, const float* logits, int64_t pos, bool guess) {
  if (done_[b]) return stops_[0];
  const int64_t token = sampler_.draw(logits, text(b) + model_.start, pos - model_.start, b, pos);
  if (!guess && std::find(stops_.begin(), stops_.end(), token) != stops_.end()) done_[b] = true, ++done_count_;
  return token;
}

// Runs the model over the tokens before `end` that its cache lacks: logits after the last of them or, with `all`, after
// each.
void Writer::run_model(CachedModel& model, int64_t end, bool all, int threads) {
  const int64_t from = model.start + model.known;
  model.decoder->forward({tokens_ + from, batch_, end - from, stride_, model.known, model.cache, logits_.data(), all},
                         threads);
  model.known = end - model.start;
}

// Where the longest run of tokens before `end` stood earlier in the window: the position after it, and its length.
std::pair<int64_t, int64_t> Writer::earlier(const int64_t* text, int64_t end) const {
  std::pair<int64_t, int64_t> best{0, 0};
  for (int64_t at = end - 1; at > model_.start && best.second < kLongest; --at) {
    int64_t equal = 0;
    while (equal < kLongest && at - equal > model_.start && text[at - 1 - equal] == text[end - 1 - equal]) ++equal;
    if (equal > best.second) best = {at, equal};
  }
  return best;
}

}  // namespace owlet
