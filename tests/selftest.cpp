// Tests every kernel this CPU supports against csrc/kernels/generic.cpp, which the tests in Python compare with PyTorch,
// and the decoder on threads of its own. It needs neither torch nor Python, so that sanitizers see every access:
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

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
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

// ---- the decoder, on threads of its own

// Logits after two prompts and a token each, and texts, on so many threads; the second call finds the threads asleep.
std::vector<float> decode(int threads) {
  constexpr int64_t kVocab = 70, kLength = 72;  // more positions than a panel has rows
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
  const DecoderModel model = read_model(source, {64, 4, 2, 16, 96, kVocab, kLength, 3, 1, 2, 1, 0});
  std::vector<int64_t> tokens(2 * kLength);
  for (int64_t& token : tokens) token = random() % kVocab;
  std::vector<float> logits(2 * kVocab);
  Decoder decoder(model);
  Cache cache(model, 2, kLength);
  for (const auto& [pos, count] : {std::pair<int64_t, int64_t>{0, kLength - 1}, {kLength - 1, 1}}) {
    decoder.forward({&tokens[pos], 2, count, kLength, pos, &cache, logits.data()}, threads);
#ifndef __wasm__  // which has one thread
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
#endif
  }
  std::vector<int64_t> texts[2];  // without guesses and with them, past the context
  for (const bool guesses : {false, true}) {
    constexpr int64_t kText = 100;
    texts[guesses].assign(2 * kText, 1);
    Writer writer({&decoder, &cache}, std::nullopt, {0.3f, 5, 0.9, 1.1f, 1}, {}, guesses ? 8 : 0, texts[guesses].data(),
                  2, kText);
    for (int64_t end = 2; end < kText;) end = writer.write(end, kText, 1.0, threads);
  }
  if (texts[0] != texts[1]) return {NAN};
  logits.insert(logits.end(), texts[0].begin(), texts[0].end());
  return logits;
}

// Makes a kernel the one that decoders use.
const Kernel* use(const std::string& name) {
#ifndef __wasm__  // which has one kernel beside the plain one, and no environment
  setenv("OWLET_ISA", name.c_str(), 1);
  return &kernel();
#else
  return name == "generic" ? &generic : &wasm;
#endif
}

}  // namespace

int main() {
  const std::vector<Case> cases = make_cases();
  use("generic");
  const std::vector<float> decoded = decode(1);
  int total = 0;
  for (const std::string& name : kernel_names()) {
    int failures = 0;
    const Choice choice{use(name)};
    std::mt19937 random(1);
    for (const Case& c : cases) {
      const Problem problem = make_problem(c, random);
      const std::vector<float> expected = run(c, problem, {&generic});
      for (Choice with = choice; with.variant < std::max<size_t>(1, with.kernel->variants); ++with.variant) {
        if (!expected.empty() && same_bits(run(c, problem, with), expected)) continue;
        ++failures;
        std::printf("%s: wrong for tokens %d, N %d, K %d, activation %d, residual %d, full range %d\n", name.c_str(),
                    int(c.tokens), int(c.N), int(c.K), int(c.activation), c.residual, c.full_range);
      }
    }
    bool good = std::isfinite(decoded[0]) && decoded[0] != decoded[1];
#ifndef __wasm__
    for (int threads : {2, 3, 5}) good &= same_bits(decode(threads), decoded);
#endif
    good &= same_bits(decode(1), decoded);
    if (!good) std::printf("%s: other logits or texts by other kernels or threads, or with guesses\n", name.c_str());
    failures += !good;
    std::printf("%s: %zu cases, %d failed\n", name.c_str(), cases.size(), failures);
    total += failures;
  }
  return total != 0;
}
