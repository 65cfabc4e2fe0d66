#include "writer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>

namespace owlet {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void average(double& mean, double value, double weight) { mean += weight * (value - mean); }

// Follows the lower of values that noise makes larger, the first of all most.
void measure(double& seconds, double since) {
  const double value = now() - since;
  average(seconds, value, !seconds ? 1 : value < seconds ? 0.5 : 0.05);
}

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

// [n] = 2^32 e^-n: where 2^32 - 1 - bits is not less, the Gumbel number of these bits does not exceed n.
std::array<uint64_t, 24> gumbel_bounds() {
  std::array<uint64_t, 24> bounds;
  for (size_t n = 0; n < bounds.size(); ++n) bounds[n] = static_cast<uint64_t>(0x1p32 * std::exp(-1.0 * n)) + 1;
  return bounds;
}

// The chance of a guess before any was checked (docs/log.md, "Guesses").
double expected(int source) { return source ? source * source / (source * source + 40.0) : 0.7; }

}  // namespace

// The same settings in the same order as sample_next of generate.py. Of the tokens kept, that with the largest sum of
// log probability and Gumbel number is drawn (Gumbel, 1954), which needs no normalised probabilities. The logarithms are
// taken for the few whose random bits are large enough. They are the library's, in double precision: their last bit may
// differ from one machine to another, but hardly ever decides.
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
  int64_t best = std::max_element(x_.begin(), x_.end()) - x_.begin();
  if (settings_.temperature == 0) return best;
  const float top = x_[best];
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
  double rest = 0;  // of what is to be kept
  for (const float x : sorted_) rest += settings_.top_p * std::exp(double{x});
  std::make_heap(sorted_.begin(), sorted_.end());
  float least = 0;
  for (auto end = sorted_.end(); end != sorted_.begin() && rest > 0; --end) {
    std::pop_heap(sorted_.begin(), end);
    least = end[-1];
    rest -= std::exp(double{least});
  }
  return least;
}

Writer::Writer(Reader model, std::optional<Reader> draft, const Sampling& sampling, int64_t vocab_size,
               std::vector<int64_t> stops, int64_t most_guesses, int64_t* tokens, int64_t batch, int64_t stride)
    : model_(model), draft_(draft), sampler_(sampling, vocab_size), vocab_size_(vocab_size),
      most_guesses_(std::max<int64_t>(0, std::min({most_guesses, kMost, Decoder::kMaxRows / batch - 1}))),
      stops_(std::move(stops)), tokens_(tokens), batch_(batch), stride_(stride),
      logits_(batch * (1 + most_guesses_) * vocab_size), done_(batch) {
  for (int source = 0; source <= kLongest; ++source) chance_[source] = expected(source);
  if (draft_) readers_.push_back(&*draft_);
}

int64_t Writer::write(int64_t end, int64_t limit, double seconds, int threads) {
  const double stop = now() + seconds;
  do {
    end = step(end, limit, threads);
  } while (end < limit && !ended() && now() < stop);
  return end;
}

// One pass of the model: adds the guesses that are right, and the token after them. Returns the new end.
int64_t Writer::step(int64_t end, int64_t limit, int threads) {
  for (Reader* reader : readers_)  // past the context, each goes on with half of it
    if (end - reader->start > reader->length)
      reader->start = end - std::max<int64_t>(1, reader->length / 2), reader->known = 0;
  const int64_t room = std::min({limit - end - 1, model_.start + model_.length - end, most_guesses_});
  const bool first = model_.known == 0 || model_.start + model_.known < end - 1;  // of a window, which takes long
  const bool plain = first || ++passes_ % 64 == 0;  // now and then, so that its time stays known
  const auto [count, source] = plain ? Guess{0, 0} : guess(end, room, threads);

  const double start = now();
  read(model_, end + count, count > 0, threads);
  if (!first) measure(pass_seconds_[count], start);

  int64_t matched = -1;
  for (bool match = true; match && !ended();) {
    ++matched;
    for (int64_t b = 0; b < batch_; ++b) {
      int64_t& token = text(b)[end + matched];
      const int64_t drawn = draw(b, &logits_[(b * (count + 1) + matched) * vocab_size_], end + matched);
      match = match && matched < count && drawn == token;
      token = drawn;
    }
  }
  for (int64_t i = 0; i < std::min(matched + 1, count); ++i)
    average(chance_[source], i < matched, source == kDraft ? 0.02 : 0.1);
  guessed += count, right += matched;
  end += matched + 1;
  for (Reader* reader : readers_)  // what was guessed wrong is forgotten
    reader->known = std::min(reader->known, end - 1 - reader->start);
  return end;
}

// Writes guesses at `end`, as many and from where they promise the most tokens a second.
Writer::Guess Writer::guess(int64_t end, int64_t room, int threads) {
  if (room <= 0 || !pass_seconds_[0]) return {0, 0};
  for (int source = 0; source <= kLongest; ++source)  // what failed, or seemed slow, is tried again now and then
    average(chance_[source], expected(source), 1e-3);
  for (int64_t n = 1; n <= most_guesses_; ++n) pass_seconds_[n] *= 0.999;
  draft_seconds_ *= 0.99;

  Guess best{0, 0};
  double most = 1.02 / pass_seconds_[0];  // less is not worth the risk
  const auto consider = [&](int source, int64_t room, double guess_seconds) {
    double tokens = 1, chance = 1;
    for (int64_t n = 1; n <= room && pass_seconds_[n - 1]; ++n) {  // one more than was tried
      tokens += chance *= chance_[source];
      const double speed = tokens / (std::max(pass_seconds_[n], pass_seconds_[n - 1]) + n * guess_seconds);
      if (speed > most) most = speed, best = {n, source};
    }
  };
  std::vector<int64_t> from(batch_);
  int shortest = kLongest;
  for (int64_t b = 0, equal; b < batch_; ++b) {
    if (done_[b]) continue;
    std::tie(from[b], equal) = earlier(text(b), end);
    shortest = std::min<int64_t>(shortest, equal);
  }
  if (shortest) consider(shortest, room, 0);
  if (draft_) consider(kDraft, std::min(room, draft_->start + draft_->length - end + 1), draft_seconds_);

  const auto [count, source] = best;
  for (int64_t i = end; i < end + count; ++i) {
    const bool known = source == kDraft && draft_->start + draft_->known >= i - 2;  // but for the last tokens
    const double start = now();
    if (source == kDraft) read(*draft_, i, false, threads);
    for (int64_t b = 0; b < batch_; ++b)
      text(b)[i] = source == kDraft || done_[b] ? draw(b, &logits_[b * vocab_size_], i, true)
                                                : text(b)[from[b] + i - end];
    if (known) measure(draft_seconds_, start);
  }
  return best;
}

// The token at pos of text b; a text that has ended repeats its end. A guess ends none.
int64_t Writer::draw(int64_t b, const float* logits, int64_t pos, bool guess) {
  if (done_[b]) return stops_[0];
  const int64_t token = sampler_.draw(logits, text(b) + model_.start, pos - model_.start, b, pos);
  if (!guess && std::find(stops_.begin(), stops_.end(), token) != stops_.end()) done_[b] = true, ++done_count_;
  return token;
}

// The logits after the last token before `end`, or (all) after each that is not in the caches yet.
void Writer::read(Reader& reader, int64_t end, bool all, int threads) {
  const int64_t from = reader.start + reader.known;
  reader.decoder->forward({tokens_ + from, batch_, end - from, stride_, reader.known, reader.keys, reader.values,
                           reader.length, logits_.data(), all}, threads);
  reader.known = end - reader.start;
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
