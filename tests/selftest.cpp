// Tests every kernel this CPU supports against naive loops, and the decoder's own threads, without torch or Python:
//   g++ -O2 -std=c++20 -ffp-contract=off -pthread tests/selftest.cpp csrc/[dw]*.cpp csrc/kernels/*.cpp -o selftest
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <thread>

#include "../csrc/decoder.h"
#undef CLONES  // clang gives the clones of static functions global names, which csrc/decoder.cpp has too
#define CLONES
#include "../csrc/kernels/floats.h"
#include "../csrc/writer.h"

namespace {

using namespace owlet;

struct Case {
  int64_t tokens, N, K;
  Activation activation;
  bool residual, full_range;
};

struct Problem {
  std::vector<int8_t> w;
  std::vector<float> x, scale, residual;
};

Problem make_problem(const Case& c, std::mt19937& random) {
  std::uniform_int_distribution<int> weight(-127, 127), coin(0, 1);
  std::normal_distribution<float> normal;
  const int64_t columns = c.activation == Activation::swiglu ? c.N / 2 : c.N;
  Problem p{std::vector<int8_t>(c.N * c.K), std::vector<float>(c.tokens * c.K),
            std::vector<float>(c.N), std::vector<float>(c.tokens * columns)};
  for (auto& v : p.w) v = c.full_range ? (coin(random) ? 127 : -127) : weight(random);
  for (auto& v : p.x) v = c.full_range ? (coin(random) ? 1.0f : -1.0f) : normal(random);
  for (auto& v : p.scale) v = 0.01f * std::exp(normal(random)) / std::sqrt(static_cast<float>(c.K));
  for (auto& v : p.residual) v = normal(random);
  if (c.tokens > 1) std::fill_n(p.x.begin(), c.K, 0.0f);  // a token of zeros: scale 0
  return p;
}

float naive_silu(double x) { return static_cast<float>(x / (1.0 + std::exp(-x))); }

std::vector<float> naive(const Case& c, const Problem& p) {
  const bool swiglu = c.activation == Activation::swiglu;
  std::vector<int32_t> q(c.K);
  std::vector<float> y(p.residual.size()), v(c.N);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const float* x = &p.x[t * c.K];
    float amax = 0;
    for (int64_t k = 0; k < c.K; ++k) amax = std::max(amax, std::fabs(x[k]));
    const float inverse = amax > 0 ? 127.0f / amax : 0.0f;
    for (int64_t k = 0; k < c.K; ++k) q[k] = std::lrint(x[k] * inverse);
    for (int64_t n = 0; n < c.N; ++n) {
      int32_t acc = 0;
      for (int64_t k = 0; k < c.K; ++k) acc += q[k] * p.w[n * c.K + k];
      v[n] = static_cast<float>(acc) * (amax / 127.0f) * p.scale[n];
    }
    const int64_t columns = swiglu ? c.N / 2 : c.N;
    for (int64_t n = 0; n < columns; ++n) {
      const float value = swiglu ? naive_silu(v[2 * n]) * v[2 * n + 1] : v[n];
      y[t * columns + n] = value + (c.residual ? p.residual[t * columns + n] : 0.0f);
    }
  }
  return y;
}

std::vector<float> run(const Case& c, const Problem& p, const Choice& with) {
  std::vector<uint8_t> packed(packed_bytes(c.N, c.K));
  if (!pack_panels(p.w.data(), c.N, c.K, 0, ceil_div(c.N, kPanelRows), packed.data())) return {};
  QuantizedTokens x(c.tokens, c.K);
  x.quantize(0, p.x.data(), c.tokens, c.K);
  const Int8Linear linear{{c.N, c.K, packed.data(), p.scale.data(), c.activation}};
  std::vector<float> y(p.residual.size());
  linear.forward(with, x, c.tokens, c.residual ? p.residual.data() : nullptr, 0, linear.tasks(c.tokens), y.data());
  return y;
}

// Every combination of the sizes without the largest products, with options in turn. Then every combination of options
// for one shape.
std::vector<Case> make_cases() {
  const int64_t sizes[] = {1, 3, 7, 16, 63, 64, 65, 257, 1408};
  const Activation activations[] = {Activation::none, Activation::swiglu};
  std::vector<Case> cases;
  for (int64_t tokens : sizes)
    for (int64_t N : sizes)
      for (int64_t K : sizes) {
        if (tokens * N * K > 2'000'000) continue;
        const size_t i = cases.size();
        Activation activation = activations[i % 2];
        if (N % 2 && activation == Activation::swiglu) activation = Activation::none;
        cases.push_back({tokens, N, K, activation, i % 4 < 2, i % 7 < 2});
      }
  for (Activation activation : activations)
    for (int bits = 0; bits < 4; ++bits) cases.push_back({7, 130, 257, activation, bool(bits & 1), bool(bits & 2)});
  return cases;
}

// ---- RMSNorm, RoPE, softmax

bool near(float a, double b, double bound = 1e-5) { return std::fabs(a - b) <= bound * (1 + std::fabs(b)); }

// A row with a NaN or an inf becomes zeros with a scale of NaN.
bool bad_rows_are_marked() {
  bool good = true;
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    QuantizedTokens x(2, 64);
    x.quantize(0, std::vector<float>(128, bad).data(), 2, 64);
    good &= std::isnan(x.scale[1]) && x.q_sum[1] == 0 && x.q[64] == 0;
  }
  return good;
}

bool floats_are_right(int64_t size, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(size), weight(size), sin(size), y(size);
  for (auto* values : {&x, &weight, &sin})
    for (auto& v : *values) v = normal(random);
  double squares = 0;
  for (const float v : x) squares += double{v} * v;
  const double rms = std::sqrt(squares / static_cast<double>(size) + 1e-6);
  bool good = true;
  rms_norm(x.data(), weight.data(), size, 1e-6f, y.data());
  for (int64_t d = 0; d < size; ++d) good &= near(y[d], x[d] / rms * weight[d]);
  const int64_t half = size / 2;
  rope(x.data(), weight.data(), sin.data(), half, y.data());
  for (int64_t d = 0; d < half; ++d) {
    const double a = x[d], b = x[d + half], c = weight[d], s = sin[d];
    good &= near(y[d], a * c - b * s) && near(y[d + half], b * c + a * s);
  }
  int32_t acc[kPanelRows];
  float scaled[kPanelRows], sums[kPanelRows] = {};
  float* const to[] = {sums};
  const std::vector<float> key_scales(kPanelRows, 2.0f);
  for (int n = 0; n < kPanelRows; ++n) acc[n] = n - 30;
  scale_sums(acc, 1, x.data(), 0.5f, key_scales.data(), scaled, kPanelRows);
  add_sums(acc, 1, x.data(), weight.data(), 0, kPanelRows, to);
  for (int n = 0; n < kPanelRows; ++n) good &= near(scaled[n], (n - 30) * x[0]) && near(sums[n], (n - 30) * x[0] * weight[0]);
  std::vector<float> scores(ceil_div(size, kPanelRows) * kPanelRows, NAN);  // of the padding, nothing is read
  std::vector<float> scales = scores;
  double most = -1e9, sum = 0;
  for (int64_t p = 0; p < size; ++p) scores[p] = 20 * x[p], scales[p] = weight[p], most = std::max<double>(most, scores[p]);
  for (int64_t p = 0; p < size; ++p) sum += std::exp(20.0f * x[p] - most);
  good &= near(softmax(scores.data(), scales.data(), size), 1 / sum);
  for (int64_t p = 0; p < size; ++p) good &= near(scores[p], std::exp(20.0f * x[p] - most) * weight[p]);
  for (size_t p = size; p < scores.size(); ++p) good &= scores[p] == 0;
  return good;
}

// ---- the decoder, on threads of its own

// Logits after two prompts of 7 tokens and a token each, on so many threads; the second call finds the threads asleep.
std::vector<float> decode(int threads) {
  constexpr int64_t kEmbd = 64, kHeads = 4, kKvHeads = 2, kSize = 16, kHidden = 96, kVocab = 70, kLength = 8, kLayers = 3;
  std::mt19937 random(7);
  struct Random : CpuLayout {
    explicit Random(std::mt19937& random) : random(random) {}
    std::mt19937& random;
    std::deque<std::vector<uint8_t>> packed;
    std::deque<std::vector<float>> held;
    float* numbers(int64_t count, float size) {
      held.emplace_back(count);
      for (float& x : held.back()) x = size * std::uniform_real_distribution<float>(0.5f, 1.5f)(random);
      return held.back().data();
    }
    float number(const char*) { return 1e-6f; }
    const float* floats(const char*, int64_t rows, int64_t columns) { return numbers(rows * columns, 1.0f); }
    Int8Linear matrix(const char*, int64_t N, int64_t K) {
      std::vector<int8_t> w(N * K);
      for (int8_t& q : w) q = static_cast<int8_t>(random() % 255 - 127);
      packed.emplace_back(packed_bytes(N, K));
      pack_panels(w.data(), N, K, 0, ceil_div(N, kPanelRows), packed.back().data());
      return {{N, K, packed.back().data(), numbers(N, 0.002f), Activation::none}};
    }
    void require(bool condition, const char* name, const char*, int64_t) {
      if (!condition) std::printf("%s is refused\n", name), std::abort();
    }
  } source(random);
  const Sizes sizes{kEmbd, kHeads, kKvHeads, kSize, kHidden, kVocab, kLength, kLayers, 1, 2, 1, 0};
  const DecoderModel model = read_model(source, sizes);
  const int64_t tokens[2][kLength] = {{1, 2, 3, 4, 5, 6, 7, 8}, {9, 69, 0, 30, 2, 1, 4, 5}};
  std::vector<float> logits(2 * kVocab);
  Decoder decoder(model);
  Cache cache(model, 2, kLength);
  for (const auto& [pos, count] : {std::pair<int64_t, int64_t>{0, 7}, {7, 1}}) {
    decoder.forward({&tokens[0][pos], 2, count, kLength, pos, &cache, logits.data()}, threads);
#ifndef __wasm__  // which has one thread
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
#endif
  }
  std::vector<int64_t> texts[2];  // without guesses and with them, past the context
  for (const bool guesses : {false, true}) {
    constexpr int64_t kText = 64;
    texts[guesses].assign(2 * kText, 1);
    Writer writer({&decoder, &cache}, std::nullopt, {0.3f, 5, 0.9, 1.1f, 1}, {}, guesses ? 8 : 0, texts[guesses].data(),
                  2, kText);
    for (int64_t end = 2; end < kText;) end = writer.write(end, kText, 1.0, threads);
  }
  if (texts[0] != texts[1]) return {NAN};
  logits.insert(logits.end(), texts[0].begin(), texts[0].end());
  return logits;
}

}  // namespace

int main() {
  const std::vector<std::string> names = kernel_names();
  std::vector<int> failures(names.size(), 0);
  std::vector<Choice> choices;
  const auto use = [](const std::string& name) {
#ifndef __wasm__  // which has one kernel beside the reference, and no environment
    setenv("OWLET_ISA", name.c_str(), 1);
    return &kernel();
#else
    return name == "generic" ? &generic : &wasm;
#endif
  };
  for (const std::string& name : names) choices.push_back({use(name)});
  std::mt19937 random(1);
  const std::vector<Case> cases = make_cases();
  for (const Case& c : cases) {
    const Problem problem = make_problem(c, random);
    const std::vector<float> expected = naive(c, problem);
    const std::vector<float> by_generic = run(c, problem, {&generic});
    for (size_t i = 0; i < names.size(); ++i) {
      // Exact without an activation. With one, exp may differ from libm's, but not between kernels.
      const float tolerance = c.activation == Activation::none ? 0.0f : 1e-6f;
      bool good = true;
      for (Choice with = choices[i]; with.variant < std::max<size_t>(1, with.kernel->variants); ++with.variant) {
        const std::vector<float> y = run(c, problem, with);
        good &= y.size() == expected.size() && !std::memcmp(y.data(), by_generic.data(), y.size() * sizeof(float));
        for (size_t j = 0; good && j < y.size(); ++j)
          good = std::fabs(y[j] - expected[j]) <= tolerance * (1 + std::fabs(expected[j]));
      }
      if (good) continue;
      ++failures[i];
      std::printf("%s: wrong for tokens %d, N %d, K %d, activation %d, residual %d, full range %d\n", names[i].c_str(),
                  int(c.tokens), int(c.N), int(c.K), int(c.activation), c.residual, c.full_range);
    }
  }
  int total = !bad_rows_are_marked();
  if (total) std::printf("rows that are not finite are not marked\n");
  for (int64_t size : {2, 6, 16, 40, 64, 80, 128, 130}) {
    if (floats_are_right(size, random)) continue;
    ++total;
    std::printf("norm, RoPE or softmax wrong for size %d\n", int(size));
  }
  for (size_t i = 0; i < names.size(); ++i) {
    use(names[i]);
    const std::vector<float> expected = decode(1);
    bool good = std::isfinite(expected[0]) && expected[0] != expected[1];
#ifndef __wasm__
    for (int threads : {2, 3, 5}) good &= decode(threads) == expected;
#endif
    if (!good) std::printf("%s: other logits or texts on other numbers of threads, or with guesses\n", names[i].c_str());
    failures[i] += !good;
  }
  for (size_t i = 0; i < names.size(); ++i) {
    std::printf("%s: %zu cases, %d failed\n", names[i].c_str(), cases.size(), failures[i]);
    total += failures[i];
  }
  return total != 0;
}
