#include "decoder.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <deque>
#include <functional>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/floats.h"

namespace owlet {
namespace {

#ifdef __wasm__  // without threads: a team starts none, and its barrier waits for nobody
struct Worker {
  explicit Worker(auto&&) {}
  void join() {}
};
void yield() {}
#else
using Worker = std::thread;
using std::this_thread::yield;
#endif

constexpr int64_t kQueries = 32;  // rows of queries that attend takes together (docs/log.md, "Blocks of attention")

}  // namespace

// Threads meet here five times per layer, so they spin. A thread that has waited long yields, in case there are
// more threads than free cores, and then sleeps. The last thread to arrive has acquired the writes of all others with
// arrived_ and releases them with phase_ to every thread that leaves. It resets arrived_ first, so the next phase starts
// at 0.
class Decoder::Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins)
        pause();
      else if (spins < kYields)
        yield();
      else
        phase_.wait(phase, std::memory_order_acquire);
    }
  }

 private:
  static constexpr int kSpins = 2000, kYields = 4000;  // about 50 us, and another 0.5 ms (docs/log.md, "Spin barriers")
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int threads_;
  std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

// Threads for a build without OpenMP (macOS, clang on Linux). With it, torch's own threads are used: two pools would
// take each other's cores.
class Decoder::Team {
 public:
  explicit Team(int threads) : threads(threads), barrier(threads) {
    for (int i = 1; i < threads; ++i)
      workers_.emplace_back([this, i] {
        for (barrier.wait(); work_; barrier.wait()) {
          (*work_)(i);
          barrier.wait();
        }
      });
  }
  ~Team() {
    work_ = nullptr;
    barrier.wait();
    for (Worker& worker : workers_) worker.join();
  }
  void run(const std::function<void(int)>& work) {
    work_ = &work;
    barrier.wait();
    work(0);
    barrier.wait();
  }
  const int threads;
  Barrier barrier;

 private:
  const std::function<void(int)>* work_ = nullptr;
  std::vector<Worker> workers_;
};

// ---- the cache

Cache::Cache(const DecoderModel& m, int64_t batch, int64_t length)
    : batch(batch), length(length), padded(ceil_div(length, kPanelRows) * kPanelRows), n_kv_head_(m.n_kv_head),
      head_dim_(m.head_dim) {
  const int64_t heads = m.n_layer * batch * n_kv_head_;
  keys_.resize(heads * packed_bytes(padded, head_dim_) / kLine);
  values_.resize(heads * packed_bytes(head_dim_, padded) / kLine);
  key_scales_.resize(heads * padded);
  value_scales_.resize(heads * padded);
}

HeadCache Cache::head(int64_t layer, int64_t b, int64_t kv_head) {
  const int64_t i = (layer * batch + b) * n_kv_head_ + kv_head;
  return {padded, keys_[0].bytes + i * packed_bytes(padded, head_dim_),
          values_[0].bytes + i * packed_bytes(head_dim_, padded), &key_scales_[i * padded], &value_scales_[i * padded]};
}

// ---- buffers

// The quantized inputs of the products.
struct Decoder::Rows {
  Rows(const DecoderModel& m, int64_t rows) : x(rows, m.n_embd), attn_out(rows, m.width()) {
    for (const Int8Linear& slice : m.blocks[0].down) hidden.emplace_back(rows, slice.K);
  }
  QuantizedTokens x, attn_out;
  std::deque<QuantizedTokens> hidden;  // one for each slice of the channels
};

struct Decoder::Thread {
  explicit Thread(const DecoderModel& m)
      : quantized(m, 2), normed(std::max(m.n_embd, m.head_dim)), queries(kQueries, m.head_dim),
        weights(kQueries, kPanelRows) {}
  Rows quantized;  // for a single token, which every thread quantizes for itself; two rows for a fine head
  std::vector<float> normed;
  // attention's
  QuantizedTokens queries, weights;
  std::vector<float> scores;  // (kQueries, length)
};

Decoder::Decoder(DecoderModel model) : model(std::move(model)), choice_{&owlet::kernel()} {}
Decoder::~Decoder() = default;

std::string Decoder::kernel() const {
  const Kernel& kernel = *choice_.kernel;
  return std::string(kernel.name) + (kernel.variants ? std::string(", ") + kernel.one_token[choice_.variant].name : "");
}

void Decoder::prepare(const Step& step, int threads) {
  const int64_t fine = model.fine_head ? 2 * step.batch * (step.all ? step.count : 1) : 0;  // rows of the head's input
  const int64_t rows = std::max(step.batch * step.count, fine);
  logits_.resize(std::max<size_t>(logits_.size(), fine * model.vocab_size));
  if (rows > rows_) {
    x_.resize(rows * model.n_embd);
    qkv_.resize(rows * model.qkv_width());
    attn_out_.resize(rows * model.width());
    hidden_.resize(rows * model.n_hidden);
    quantized_ = std::make_unique<Rows>(model, rows);
    rows_ = rows;  // last, because the lines above may throw
  }
  while (static_cast<int>(threads_.size()) < threads) threads_.push_back(std::make_unique<Thread>(model));
  for (int t = 0; t < threads; ++t) threads_[t]->scores.resize(kQueries * step.cache->padded);
}

// ---- one thread's part of a step, in the order of model.py

class Decoder::Pass {
 public:
  Pass(Decoder& decoder, const Step& step, Barrier& barrier, int index, int threads)
      : d(decoder), m(decoder.model), step(step), own(*decoder.threads_[index]), barrier(barrier), index(index),
        threads(threads), rows(step.batch * step.count) {}

  void run() {
    embed();
    for (int64_t layer = 0; layer < m.n_layer; ++layer) {
      const bool last = layer == m.n_layer - 1;
      if (!attention(layer, last)) return;
      mlp(m.blocks[layer]);
    }
    m.fine_head ? fine_head() : multiply(m.head, norm(m.norm), step.logits);
  }

 private:
  void embed() {
    share(rows, [&](int64_t i) {
      m.embedding.read_row(step.tokens[i / step.count * step.stride + i % step.count], x(i));
    });
    barrier.wait();
  }

  // Returns false where nothing is left to do: the last layer of a step without logits.
  bool attention(int64_t layer, bool last) {
    const DecoderBlock& block = m.blocks[layer];
    multiply(block.qkv, norm(block.input_norm), d.qkv_.data());
    // One row of attention is one query head of one token. Rows that share a key/value head form blocks of kQueries. If
    // all fit one block, the thread that computes it also appends the keys and values that it needs.
    const bool only_last = last && !step.all;  // the last layer needs only the last token's output
    const int64_t begin = only_last ? (step.count - 1) * m.group() : 0, end = step.count * m.group();
    const int64_t blocks = ceil_div(end - begin, kQueries), heads = step.batch * m.n_kv_head;
    const bool one_block = end <= kQueries;
    const auto append_row = [&](int64_t i) { append(layer, i / m.n_kv_head, i % m.n_kv_head); };
    if (!one_block) {
      share(rows * m.n_kv_head, append_row);
      barrier.wait();
    }
    for (int64_t i = index; i < heads * blocks; i += threads) {
      const int64_t b = i / blocks / m.n_kv_head, kv_head = i / blocks % m.n_kv_head;
      for (int64_t t = 0; one_block && t < step.count; ++t) append_row((b * step.count + t) * m.n_kv_head + kv_head);
      if (last && !step.logits) continue;
      // Later blocks see more keys. The rotation gives each thread early and late ones.
      const int64_t first = begin + (i + i / blocks) % blocks * kQueries;
      attend(layer, b, kv_head, first, std::min(kQueries, end - first), only_last);
    }
    if (last && !step.logits) return false;
    if (only_last) {  // each sequence's last row moves to the front
      for (int64_t b = 0; index == 0 && b < step.batch; ++b) std::copy_n(x((b + 1) * step.count - 1), m.n_embd, x(b));
      rows = step.batch;
    }
    barrier.wait();
    multiply(block.o, quantize(&Rows::attn_out, [&](int64_t i) { return &d.attn_out_[i * m.width()]; }), x(0), x(0));
    return true;
  }

  void mlp(const DecoderBlock& block) {
    multiply(block.gate_up, norm(block.post_norm), d.hidden_.data());
    Rows& out = inputs();
    each_row([&](int64_t i) {
      for (size_t s = 0; s < block.down.size(); ++s)
        out.hidden[s].quantize(i, &d.hidden_[i * m.n_hidden + s * block.down[s].K]);
    });
    for (size_t s = 0; s < block.down.size(); ++s) multiply_part(block.down[s], out.hidden[s], x(0), x(0));
    barrier.wait();
  }

  // Row 2 i holds x in int8, row 2 i + 1 its rounding error in int8. The logits are the sum of both products.
  void fine_head() {
    Rows& out = inputs();
    each_row([&](int64_t i) {
      float* const rest = normed(m.norm, i);
      out.x.quantize(2 * i, rest);
      const int8_t* const q = &out.x.q[2 * i * row_bytes(out.x.quads)];
      for (int64_t k = 0; k < m.n_embd; ++k) rest[k] -= static_cast<float>(q[k]) * out.x.scale[2 * i];
      out.x.quantize(2 * i + 1, rest);
    });
    rows *= 2;
    multiply(m.head, out.x, d.logits_.data());
    const int64_t N = m.head.N, first = N * index / threads, last = N * (index + 1) / threads;
    for (int64_t i = 0; i < rows / 2; ++i) {
      const float *of_x = &d.logits_[2 * i * N], *of_rest = of_x + N;
      for (int64_t n = first; n < last; ++n) step.logits[i * N + n] = of_x[n] + of_rest[n];
    }
  }

  // ---- products

  // Runs body on this thread's share of `things` indices, which is always the same.
  template <typename Body>
  void share(int64_t things, Body body) {
    for (int64_t i = things * index / threads; i < things * (index + 1) / threads; ++i) body(i);
  }

  // Every thread quantizes a single row for itself, which is faster than waiting for another. Threads share several.
  Rows& inputs() { return rows == 1 ? own.quantized : *d.quantized_; }
  template <typename Body>
  void each_row(Body body) {
    if (rows == 1) return body(0);
    share(rows, body);
    barrier.wait();
  }

  template <typename Row>
  const QuantizedTokens& quantize(QuantizedTokens Rows::*which, Row row) {
    QuantizedTokens& out = inputs().*which;
    each_row([&](int64_t i) { out.quantize(i, row(i)); });
    return out;
  }

  const QuantizedTokens& norm(const float* weight) {
    return quantize(&Rows::x, [&](int64_t i) { return normed(weight, i); });
  }

  float* normed(const float* weight, int64_t i) {
    rms_norm(x(i), weight, m.n_embd, m.norm_eps, own.normed.data());
    return own.normed.data();
  }

  // This thread's part of a product; the caller waits for the others.
  void multiply_part(const Int8Linear& linear, const QuantizedTokens& x, float* y, const float* residual) {
    const int64_t tasks = linear.tasks(rows);
    linear.forward(d.choice_, x, rows, residual, tasks * index / threads, tasks * (index + 1) / threads, y);
  }

  void multiply(const Int8Linear& linear, const QuantizedTokens& x, float* y, const float* residual = nullptr) {
    multiply_part(linear, x, y, residual);
    barrier.wait();
  }

  float* x(int64_t row) { return &d.x_[row * m.n_embd]; }
  float* qkv(int64_t row, int64_t head) { return &d.qkv_[row * m.qkv_width() + head * m.head_dim]; }

  // ---- attention

  // For one key/value head of a token: applies QK-norm and RoPE to the key and its queries, then adds the key and the
  // value to the cache.
  void append(int64_t layer, int64_t row, int64_t kv_head) {
    const DecoderBlock& block = m.blocks[layer];
    const int64_t size = m.head_dim, half = size / 2, pos = step.pos + row % step.count;
    float* const normed = own.normed.data();
    const auto norm_and_rope = [&](float* x, const float* weight) {
      weight ? rms_norm(x, weight, size, m.norm_eps, normed) : void(std::copy_n(x, size, normed));
      rope(normed, m.cos + pos * half, m.sin + pos * half, half, x);
    };
    for (int64_t h = kv_head * m.group(); h < (kv_head + 1) * m.group(); ++h) norm_and_rope(qkv(row, h), block.q_norm);
    float* const key = qkv(row, m.n_head + kv_head);  // the value lies behind the keys of all heads
    norm_and_rope(key, block.k_norm);

    const HeadCache cache = step.cache->head(layer, row / step.count, kv_head);
    const QuantizedTokens& quantized = own.queries;  // free here: row 0 takes the key, row 1 the value
    own.queries.quantize(0, key, 2, m.n_kv_head * size);
    cache.key_scales[pos] = quantized.scale[0], cache.value_scales[pos] = quantized.scale[1];
    const int8_t *const k = quantized.q.get(), *const v = k + row_bytes(quantized.quads);
    uint8_t* to = cache.keys + packed_at(pos, 0, size);
    for (int64_t i = 0; i < size; i += 4, to += kQuadBytes) {
      const uint32_t quad = load_quad(k + i) ^ 0x80808080;  // + 128, four times
      std::memcpy(to, &quad, 4);
    }
    for (int64_t n = 0; n < size; n += kPanelRows) {
      to = cache.values + packed_at(n, pos, cache.length);
      for (int64_t i = n; i < std::min(n + kPanelRows, size); ++i, to += 4) *to = static_cast<uint8_t>(v[i] + 128);
    }
  }

  // softmax(q K^T / sqrt(head_dim)) V for rows [first, first + count) of a key/value head of sequence b: row i is query
  // head i % group of token i / group. All is int8: queries, keys and values with a scale each, the softmax's weights
  // with one for each 64 positions. only_last: the results go to row b of attn_out_.
  void attend(int64_t layer, int64_t b, int64_t kv_head, int64_t first, int64_t count, bool only_last) {
    const HeadCache cache = step.cache->head(layer, b, kv_head);
    const int64_t size = m.head_dim, group = m.group();
    const auto token = [&](int64_t i) { return (first + i) / group; };
    const auto head = [&](int64_t i) { return kv_head * group + (first + i) % group; };
    const auto visible = [&](int64_t i) { return step.pos + token(i) + 1; };
    for (int64_t i = 0; i < count; ++i) own.queries.quantize(i, qkv(b * step.count + token(i), head(i)));

    const QuantizedTokens &q = own.queries, &weights = own.weights;
    const float factor = 1.0f / std::sqrt(static_cast<float>(size));
    const auto scores = [&](int64_t i) { return &own.scores[i * cache.length]; };
    for (int64_t p = 0; p < visible(count - 1); p += kPanelRows)
      d.choice_.multiply(q.q.get(), q.q_sum.get(), count, cache.keys + packed_at(p, 0, size), q.quads, kPanelRows,
                       [&](int64_t t, int64_t tokens, const int32_t* acc) {
                         scale_sums(acc, tokens, &q.scale[t], factor, cache.key_scales + p, scores(t) + p, cache.length);
                       });

    float* y[kQueries], inverse[kQueries];
    for (int64_t i = 0; i < count; ++i) {
      inverse[i] = softmax(scores(i), cache.value_scales, visible(i));
      y[i] = &d.attn_out_[(only_last ? b : b * step.count + token(i)) * m.width() + head(i) * size];
      std::fill_n(y[i], size, 0.0f);
    }
    for (int64_t p = 0; p < visible(count - 1); p += kPanelRows) {
      const int64_t quads = std::min(weights.quads, ceil_div(visible(count - 1) - p, 4));  // the last block may be short
      int64_t from = 0;
      while (visible(from) <= p) ++from;  // the rows before `from` do not see these positions
      own.weights.quantize(from, scores(from) + p, count - from, cache.length);
      for (int64_t n = 0; n < size; n += kPanelRows) {
        const int rows = std::min<int64_t>(kPanelRows, size - n);
        d.choice_.multiply(&weights.q[from * row_bytes(weights.quads)], &weights.q_sum[from], count - from,
                         cache.values + packed_at(n, p, cache.length), quads, rows,
                         [&](int64_t t, int64_t tokens, const int32_t* acc) {
                           add_sums(acc, tokens, &weights.scale[from + t], &inverse[from + t], n, rows, &y[from + t]);
                         });
      }
    }
  }

  Decoder& d;
  const DecoderModel& m;
  const Step& step;
  Thread& own;
  Barrier& barrier;
  const int index, threads;
  int64_t rows;
};

// ---- steps

void Decoder::forward(Step step, int threads) {
  const int64_t end = step.pos + step.count, chunk = std::max<int64_t>(1, kMaxRows / step.batch);
  float* const logits = step.logits;
  for (; step.pos < end; step.pos += step.count, step.tokens += step.count) {
    step.count = std::min(chunk, end - step.pos);
    if (!step.all) step.logits = step.pos + step.count == end ? logits : nullptr;
    step.batch * step.count == 1 ? choose_variant(step, threads) : run(step, threads);
    if (step.all) step.logits += step.count * model.vocab_size;
  }
}

// Times the kernel's ways to read the weights on a model's first tokens, in turns, and uses the fastest from then on.
// The sums are exact, so the tokens are the same in each.
void Decoder::choose_variant(const Step& step, int threads) {
  constexpr size_t kTurns = 8;
  const size_t variants = choice_.kernel->variants, trials = variants * kTurns;
  if (threads != timed_for_) seconds_.clear(), timed_for_ = threads;
  if (seconds_.size() == trials) return run(step, threads);
  choice_.variant = seconds_.size() % variants;
  const auto start = std::chrono::steady_clock::now();
  run(step, threads);
  seconds_.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  if (seconds_.size() == trials)
    choice_.variant = (std::min_element(seconds_.begin(), seconds_.end()) - seconds_.begin()) % variants;
}

void Decoder::run(const Step& step, int threads) {
  prepare(step, threads);
#ifdef _OPENMP
  std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier = std::make_unique<Barrier>(omp_get_num_threads());  // the team may be smaller than requested
    Pass(*this, step, *barrier, omp_get_thread_num(), omp_get_num_threads()).run();
  }
#else
  if (!team_ || team_->threads != threads) team_ = std::make_unique<Team>(threads);
  team_->run([&](int index) { Pass(*this, step, team_->barrier, index, threads).run(); });
#endif
}

}  // namespace owlet
