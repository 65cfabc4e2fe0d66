// Tests every kernel this CPU supports against naive loops, and the decoder's own threads, without torch or Python:
//   g++ -O2 -std=c++20 -ffp-contract=off -pthread tests/selftest.cpp csrc/decoder.cpp csrc/kernels/*.cpp -o selftest
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
  bool bias, residual, full_range;
};

struct Problem {
  std::vector<int8_t> w;
  std::vector<float> x, scale, bias, residual;
};

Problem make_problem(const Case& c, std::mt19937& random) {
  std::uniform_int_distribution<int> weight(-127, 127), coin(0, 1);
  std::normal_distribution<float> normal;
  const int64_t columns = c.activation == Activation::swiglu ? c.N / 2 : c.N;
  Problem p{std::vector<int8_t>(c.N * c.K), std::vector<float>(c.tokens * c.K),
            std::vector<float>(c.N), std::vector<float>(c.N),
            std::vector<float>(c.tokens * columns)};
  for (auto& v : p.w) v = c.full_range ? (coin(random) ? 127 : -127) : weight(random);
  for (auto& v : p.x) v = c.full_range ? (coin(random) ? 1.0f : -1.0f) : normal(random);
  for (auto& v : p.scale) v = 0.01f * std::exp(normal(random)) / std::sqrt(static_cast<float>(c.K));
  for (auto& v : p.bias) v = normal(random);
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
      v[n] = static_cast<float>(acc) * (amax / 127.0f) * p.scale[n] + (c.bias ? p.bias[n] : 0.0f);
      if (c.activation == Activation::silu) v[n] = naive_silu(v[n]);
    }
    const int64_t columns = swiglu ? c.N / 2 : c.N;
    for (int64_t n = 0; n < columns; ++n) {
      const float value = swiglu ? naive_silu(v[2 * n]) * v[2 * n + 1] : v[n];
      y[t * columns + n] = value + (c.residual ? p.residual[t * columns + n] : 0.0f);
    }
  }
  return y;
}

std::vector<float> run(const Case& c, const Problem& p) {
  const int64_t panels = (c.N + kPanelRows - 1) / kPanelRows;
  std::vector<uint8_t> packed(panels * ((c.K + 3) / 4) * kQuadBytes);
  if (!pack_panels(p.w.data(), c.N, c.K, 0, panels, packed.data())) return {};
  QuantizedTokens x(c.tokens, c.K);
  for (int64_t t = 0; t < c.tokens; ++t) x.quantize(t, &p.x[t * c.K]);
  const Int8Linear linear{c.N, c.K, packed.data(), p.scale.data(), c.bias ? p.bias.data() : nullptr, c.activation};
  std::vector<float> y(p.residual.size());
  linear.forward(x, c.tokens, c.residual ? p.residual.data() : nullptr, 0, linear.tasks(c.tokens), y.data());
  return y;
}

// Every combination of the sizes without the largest products, with options in turn. Then every combination of options
// for one shape.
std::vector<Case> make_cases() {
  const int64_t sizes[] = {1, 3, 7, 16, 63, 64, 65, 257, 1408};
  const Activation activations[] = {Activation::none, Activation::silu, Activation::swiglu};
  std::vector<Case> cases;
  for (int64_t tokens : sizes)
    for (int64_t N : sizes)
      for (int64_t K : sizes) {
        if (tokens * N * K > 2'000'000) continue;
        const size_t i = cases.size();
        Activation activation = activations[i % 3];
        if (N % 2 && activation == Activation::swiglu) activation = Activation::none;
        cases.push_back({tokens, N, K, activation, i % 2 == 0, i % 4 < 2, i % 7 < 2});
      }
  for (Activation activation : activations)
    for (int bits = 0; bits < 8; ++bits)
      cases.push_back({7, 130, 257, activation, bool(bits & 1), bool(bits & 2), bool(bits & 4)});
  return cases;
}

// ---- RMSNorm, RoPE, attention

struct Head {
  int64_t size, count;
  std::vector<float> q, keys, values, weight;
  std::vector<float> ones() const { return std::vector<float>(count, 1.0f); }
};

Head make_head(int64_t size, int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Head head{size, count, std::vector<float>(kQueries * size), std::vector<float>(count * size),
            std::vector<float>(count * size), std::vector<float>(size)};
  for (auto* values : {&head.q, &head.keys, &head.values, &head.weight})
    for (auto& v : *values) v = normal(random);
  return head;
}

// The concatenated results of attend, attend_block, rms_norm, rope, dequantize and attend_int8.
std::vector<float> run(const Head& h, const FloatMath& math) {
  const int64_t queries = std::min<int64_t>(kQueries, h.count), row = h.size + 3;  // rows have gaps, as in the model
  std::vector<float> q(queries * row), scratch(attention_scratch(h.count, h.size)),
      y(h.size + queries * row + 6 * h.size);
  for (int64_t i = 0; i < queries; ++i) std::copy_n(&h.q[i * h.size], h.size, &q[i * row]);
  float *one = y.data(), *block = one + h.size, *norm = block + queries * row, *rotated = norm + h.size;
  math.attend(h.q.data(), h.keys.data(), nullptr, h.values.data(), nullptr, h.count, h.size, scratch.data(), one,
              h.keys.data());
  math.attend_block(q.data(), row, queries, h.count - queries, h.keys.data(), h.values.data(), h.size, scratch.data(),
                    block, row);
  math.rms_norm(h.q.data(), h.weight.data(), h.size, 1e-6f, norm);
  std::copy_n(h.q.data(), h.size, rotated);
  math.rope(rotated, h.weight.data(), h.keys.data(), h.size / 2);
  std::vector<int8_t> q8(3 * h.size);
  for (size_t i = 0; i < q8.size(); ++i) q8[i] = static_cast<int8_t>(83 * i);
  math.dequantize(q8.data(), h.weight.data(), std::min<int64_t>(3, h.size), h.size, rotated + h.size);
  const std::vector<int8_t> k8(h.count * h.size, 3), v8(h.count * h.size, 100);
  math.attend_int8(h.q.data(), k8.data(), h.keys.data(), v8.data(), h.ones().data(), h.count, h.size, scratch.data(),
                   rotated + 4 * h.size, k8.data());
  return y;
}

bool near(float a, double b) { return std::fabs(a - b) <= 1e-5 * (1 + std::fabs(b)); }

// The expected result of attend for a query that sees `count` keys.
std::vector<double> naive_attention(const Head& h, const float* q, int64_t count) {
  std::vector<double> y(h.size);
  double sum = 0;
  for (int64_t p = 0; p < count; ++p) {
    double score = 0;
    for (int64_t d = 0; d < h.size; ++d) score += double(q[d]) * h.keys[p * h.size + d];
    const double weight = std::exp(score / std::sqrt(double(h.size)));
    sum += weight;
    for (int64_t d = 0; d < h.size; ++d) y[d] += weight * h.values[p * h.size + d];
  }
  for (double& v : y) v /= sum;
  return y;
}

bool right(const Head& h, const std::vector<float>& y) {
  const int64_t queries = std::min<int64_t>(kQueries, h.count), row = h.size + 3, half = h.size / 2;
  const float *block = &y[h.size], *norm = block + queries * row, *rotated = norm + h.size;
  bool good = true;
  const std::vector<double> one = naive_attention(h, h.q.data(), h.count);
  for (int64_t d = 0; d < h.size; ++d) good &= near(y[d], one[d]);
  for (int64_t i = 0; i < queries; ++i) {
    const std::vector<double> expected = naive_attention(h, &h.q[i * h.size], h.count - queries + i + 1);
    for (int64_t d = 0; d < h.size; ++d) good &= near(block[i * row + d], expected[d]);
  }
  double squares = 0;
  for (int64_t d = 0; d < h.size; ++d) squares += double(h.q[d]) * h.q[d];
  const double rms = std::sqrt(squares / h.size + 1e-6);
  for (int64_t d = 0; d < h.size; ++d) good &= near(norm[d], h.q[d] / rms * h.weight[d]);
  for (int64_t d = 0; d < half; ++d) {
    const double a = h.q[d], b = h.q[d + half], cos = h.weight[d], sin = h.keys[d];
    good &= near(rotated[d], a * cos - b * sin) && near(rotated[d + half], b * cos + a * sin);
  }
  const float* rows = rotated + h.size;
  for (int64_t i = 0; i < std::min<int64_t>(3, h.size) * h.size; ++i)
    good &= near(rows[i], double(static_cast<int8_t>(83 * i)) * h.weight[i / h.size]);
  for (int64_t d = 0; d < h.size; ++d) good &= near(rows[3 * h.size + d], 100.0);  // all values are equal
  return good;
}

// ---- the decoder, on threads of its own

// Logits after two prompts of 7 tokens and a token each, on so many threads; the second call finds the threads asleep.
std::vector<float> decode(int threads) {
  constexpr int64_t kEmbd = 64, kHeads = 4, kKvHeads = 2, kSize = 16, kHidden = 96, kVocab = 70, kLength = 8, kLayers = 3;
  std::mt19937 random(7);
  std::deque<std::vector<uint8_t>> packed;
  std::deque<std::vector<float>> floats;
  const auto numbers = [&](int64_t count) {
    floats.emplace_back(count);
    for (float& x : floats.back()) x = std::uniform_real_distribution<float>(0.5f, 1.5f)(random);
    return floats.back().data();
  };
  const auto matrix = [&](int64_t N, int64_t K, Activation activation = Activation::none) {
    std::vector<int8_t> w(N * K);
    for (int8_t& q : w) q = static_cast<int8_t>(random() % 255 - 127);
    const int64_t panels = ceil_div(N, kPanelRows);
    packed.emplace_back(panels * ceil_div(K, 4) * kQuadBytes);
    pack_panels(w.data(), N, K, 0, panels, packed.back().data());
    float* const scale = numbers(N);
    for (int64_t n = 0; n < N; ++n) scale[n] *= 0.002f;
    return Int8Linear{{N, K, packed.back().data(), scale, nullptr, activation}};
  };
  DecoderModel model{kEmbd, kHeads, kKvHeads, kSize, kHidden, 1e-6f, numbers(kLength * kSize / 2),
                     numbers(kLength * kSize / 2), matrix(kVocab, kEmbd), {}, numbers(kEmbd), matrix(kVocab, kEmbd), true};
  for (int64_t layer = 0; layer < kLayers; ++layer)
    model.blocks.push_back({numbers(kEmbd), matrix((kHeads + 2 * kKvHeads) * kSize, kEmbd), numbers(kSize),
                            numbers(kSize), matrix(kEmbd, kHeads * kSize), numbers(kEmbd),
                            matrix(2 * kHidden, kEmbd, Activation::swiglu),
                            {matrix(kEmbd, kHidden / 2), matrix(kEmbd, kHidden / 2)}});
  const int64_t tokens[2][kLength] = {{1, 2, 3, 4, 5, 6, 7, 8}, {9, 69, 0, 30, 2, 1, 4, 5}};
  const int64_t cache = kLayers * 2 * kKvHeads * kLength * kSize;
  std::vector<float> keys(cache), values(cache), logits(2 * kVocab);
  Decoder decoder(model);
  for (const auto& [pos, count] : {std::pair<int64_t, int64_t>{0, 7}, {7, 1}}) {
    decoder.forward({&tokens[0][pos], 2, count, kLength, pos, {keys.data(), nullptr, nullptr},
                     {values.data(), nullptr, nullptr}, kLength, logits.data()}, threads);
#ifndef __wasm__  // which has one thread
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
#endif
  }
  std::vector<int64_t> texts[2];  // without guesses and with them, past the context
  for (const bool guesses : {false, true}) {
    constexpr int64_t kText = 64;
    texts[guesses].assign(2 * kText, 1);
    Writer writer({&decoder, {keys.data(), nullptr, nullptr}, {values.data(), nullptr, nullptr}, kLength}, std::nullopt,
                  {0.3f, 5, 0.9f, 1.1f, 1}, kVocab, {}, guesses ? 8 : 0, texts[guesses].data(), 2, kText);
    for (int64_t end = 2; end < kText;) end = writer.write(end, kText, 1.0, threads);
  }
  if (texts[0] != texts[1]) return {NAN};
  logits.insert(logits.end(), texts[0].begin(), texts[0].end());
  return logits;
}

#ifdef __wasm__
// The fused multiply-adds of numerics.h against the C library's, on sums at ties of float and a little beside them: a
// product of 25 bits, and an addend that double cuts off.
bool fma_is_exact(std::mt19937& random) {
  const auto odd = [&](int bits) { return static_cast<float>(random() >> (32 - bits) | 1 | 1u << (bits - 1)); };
  for (int i = 0; i < 200'000; ++i) {
    const float a = odd(i % 2 ? 13 : 24), b = odd(i % 2 ? 12 : 24) * (random() % 2 ? 1.0f : -1.0f);
    const float c = (random() % 2 ? 1.0f : -1.0f) * std::ldexp(odd(random() % 24 + 1), int(random() % 100) - 70);
    const float expected = std::fma(a, b, c);
    const Wide of_four = owlet::fma(Wide{a, 1, a, 1}, Wide{b, 1, 1, b}, Wide{c, 1, c, 1});
    if (owlet::fma(a, b, c) != expected || of_four[0] != expected) return false;
  }
  return true;
}
#endif

}  // namespace

int main() {
  const std::vector<std::string> names = kernel_names();
  std::vector<int> failures(names.size(), 0);
  std::mt19937 random(1);
  const std::vector<Case> cases = make_cases();
  for (const Case& c : cases) {
    const Problem problem = make_problem(c, random);
    const std::vector<float> expected = naive(c, problem);
    use_kernel("generic");
    const std::vector<float> generic = run(c, problem);
    for (size_t i = 0; i < names.size(); ++i) {
      use_kernel(names[i]);
      const std::vector<float> y = run(c, problem);
      // Exact without an activation. With one, exp may differ from libm's, but not between kernels.
      const float tolerance = c.activation == Activation::none ? 0.0f : 1e-6f;
      bool good = y.size() == expected.size() &&
                  !std::memcmp(y.data(), generic.data(), y.size() * sizeof(float));
      for (size_t j = 0; good && j < y.size(); ++j)
        good = std::fabs(y[j] - expected[j]) <= tolerance * (1 + std::fabs(expected[j]));
      if (good) continue;
      ++failures[i];
      std::printf("%s: wrong for tokens %d, N %d, K %d, activation %d, bias %d, residual %d, "
                  "full range %d\n",
                  names[i].c_str(), int(c.tokens), int(c.N), int(c.K), int(c.activation), c.bias,
                  c.residual, c.full_range);
    }
  }
  for (int64_t size : {2, 6, 16, 40, 64, 80, 128})
    for (int64_t count : {1, 3, 4, 17, 33, 130}) {
      const Head head = make_head(size, count, random);
      const std::vector<float> expected = run(head, generic_math);
      for (size_t i = 0; i < names.size(); ++i) {
        use_kernel(names[i]);
        const std::vector<float> y = run(head, *kernel().floats);
        if (right(head, y) && !std::memcmp(y.data(), expected.data(), y.size() * sizeof(float))) continue;
        ++failures[i];
        std::printf("%s: attention, norm or RoPE wrong for size %d, count %d\n", names[i].c_str(), int(size),
                    int(count));
      }
    }
  int total = 0;
#ifdef __wasm__
  if (!fma_is_exact(random)) std::printf("a fused multiply-add is rounded twice\n"), total = 1;
#endif
  for (size_t i = 0; i < names.size(); ++i) {
    use_kernel(names[i]);
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
