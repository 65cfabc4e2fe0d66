#include "decoder.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <functional>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

const FloatMath& floats() { return *kernel().floats; }

// Writes x (size) to row `row` of a cache.
void write_cache(const Cache& cache, int64_t row, int64_t size, const float* x) {
  if (cache.int8)
    cache.scales[row] = quantize_row(x, size, cache.int8 + row * size).scale;
  else
    std::copy_n(x, size, cache.floats + row * size);
}

// Rows [row, row + count) of a cache as floats: the cache's own, or dequantized into scratch.
const float* read_cache(const Cache& cache, int64_t row, int64_t count, int64_t size, float* scratch) {
  if (!cache.int8) return cache.floats + row * size;
  floats().dequantize(cache.int8 + row * size, cache.scales + row, count, size, scratch);
  return scratch;
}

}  // namespace

// Threads meet here some forty times per token, so they spin. A thread that has waited long yields, in case there are
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

// The quantized inputs of the products.
struct Decoder::Rows {
  Rows(const DecoderModel& m, int64_t rows) : x(rows, m.n_embd), attn_out(rows, m.n_head * m.head_dim) {
    for (const Int8Linear& slice : m.blocks[0].down) hidden.emplace_back(rows, slice.K);
  }
  QuantizedTokens x, attn_out;
  std::deque<QuantizedTokens> hidden;  // one for each slice of the channels
};

struct Decoder::Thread {
  explicit Thread(const DecoderModel& m) : quantized(m, 2), normed(m.n_embd) {}
  Rows quantized;  // for a single token, which every thread quantizes for itself; two rows for a fine head
  std::vector<float> normed, scratch, keys, values;
};

Decoder::Decoder(DecoderModel model) : model_(std::move(model)) {}
Decoder::~Decoder() = default;

void Decoder::prepare(const Step& step, int threads) {
  variant();  // choosing the kernel may throw, which a parallel region does not allow
  const DecoderModel& m = model_;
  const int64_t fine = m.fine_head ? 2 * step.batch * (step.all ? step.count : 1) : 0;  // rows of the head's input
  const int64_t rows = std::max(step.batch * step.count, fine);
  logits_.resize(std::max<size_t>(logits_.size(), fine * m.head.N));
  if (rows > rows_) {
    x_.resize(rows * m.n_embd);
    qkv_.resize(rows * (m.n_head + 2 * m.n_kv_head) * m.head_dim);
    attn_out_.resize(rows * m.n_head * m.head_dim);
    hidden_.resize(rows * m.n_hidden);
    quantized_ = std::make_unique<Rows>(m, rows);
    rows_ = rows;  // last, because the lines above may throw
  }
  while (static_cast<int>(threads_.size()) < threads) threads_.push_back(std::make_unique<Thread>(m));
  for (int t = 0; t < threads; ++t) {
    threads_[t]->scratch.resize(attention_scratch(step.length, m.head_dim));
    if (step.keys.int8) threads_[t]->keys.resize(step.length * m.head_dim);
    if (step.values.int8) threads_[t]->values.resize(step.length * m.head_dim);
  }
}

// Times the ways to read the weights on a model's first tokens, in turns, and uses the fastest from then on. The sums
// are exact, so the tokens are the same in each.
void Decoder::choose_variant(const Step& step, int threads) {
  constexpr size_t kTurns = 8;
  const Variant* const variants = kernel().variants;
  if (threads != chosen_for_ || variants != chosen_of_) {
    const size_t count = std::getenv("OWLET_KERNEL") ? 1 : variant_names().size();
    seconds_.clear(), chosen_for_ = threads, chosen_of_ = variants, trials_ = count > 1 ? kTurns * count : 0;
  }
  const size_t count = trials_ / kTurns, done = seconds_.size();
  if (count == 0) return run_all(step, threads);
  use_variant(variants[done < trials_ ? done % count : fastest_].name);  // another model may use another one
  if (done == trials_) return run_all(step, threads);
  const auto start = std::chrono::steady_clock::now();
  run_all(step, threads);
  seconds_.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  if (done + 1 < trials_) return;
  fastest_ = (std::min_element(seconds_.begin(), seconds_.end()) - seconds_.begin()) % count;
  use_variant(variants[fastest_].name);
}

void Decoder::run_all(const Step& step, int threads) {
  prepare(step, threads);
#ifdef _OPENMP
  std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier = std::make_unique<Barrier>(omp_get_num_threads());  // the team may be smaller than requested
    run(step, *threads_[omp_get_thread_num()], *barrier, omp_get_thread_num(), omp_get_num_threads());
  }
#else
  if (!team_ || team_->threads != threads) team_ = std::make_unique<Team>(threads);
  team_->run([&](int index) { run(step, *threads_[index], team_->barrier, index, threads); });
#endif
}

void Decoder::forward(Step step, int threads) {
  const int64_t end = step.pos + step.count, chunk = std::max<int64_t>(1, kMaxRows / step.batch);
  float* const logits = step.logits;
  for (; step.pos < end; step.pos += step.count, step.tokens += step.count) {
    step.count = std::min(chunk, end - step.pos);
    step.logits = step.pos + step.count == end ? logits : nullptr;
    step.batch * step.count == 1 ? choose_variant(step, threads) : run_all(step, threads);
  }
}

void Decoder::run(const Step& step, Thread& thread, Barrier& barrier, int index, int threads) {
  const DecoderModel& m = model_;
  const int64_t width = m.n_head * m.head_dim, last_layer = static_cast<int64_t>(m.blocks.size()) - 1;
  int64_t rows = step.batch * step.count;
  float* const x = x_.data();

  // Runs body on this thread's share of `things` indices, which is always the same.
  const auto share = [&](int64_t things, auto&& body) {
    for (int64_t i = things * index / threads; i < things * (index + 1) / threads; ++i) body(i);
  };
  // Every thread quantizes a single row for itself, which is faster than waiting for another thread. Threads share
  // several rows.
  const auto each_row = [&](auto&& quantize_row) -> const Rows& {
    Rows& out = rows == 1 ? thread.quantized : *quantized_;
    if (rows == 1) {
      quantize_row(out, 0);
    } else {
      share(rows, [&](int64_t i) { quantize_row(out, i); });
      barrier.wait();
    }
    return out;
  };
  const auto quantize = [&](QuantizedTokens Rows::*which, auto&& row) -> const QuantizedTokens& {
    return each_row([&](Rows& out, int64_t i) { (out.*which).quantize(i, row(i)); }).*which;
  };
  const auto normed = [&](const float* weight) {
    return [&, weight](int64_t i) {
      floats().rms_norm(x + i * m.n_embd, weight, m.n_embd, m.norm_eps, thread.normed.data());
      return thread.normed.data();
    };
  };
  const auto multiply_own = [&](const Int8Linear& linear, const QuantizedTokens& x, float* y,
                                const float* residual = nullptr) {
    const int64_t tasks = linear.tasks(rows);
    linear.forward(x, rows, residual, tasks * index / threads, tasks * (index + 1) / threads, y);
  };
  const auto multiply = [&](auto&&... of) {
    multiply_own(of...);
    barrier.wait();
  };

  share(rows, [&](int64_t i) {
    const int64_t token = step.tokens[i / step.count * step.stride + i % step.count];
    m.embedding.read_row(token, x + i * m.n_embd);
  });
  barrier.wait();

  for (int64_t layer = 0; layer <= last_layer; ++layer) {
    const DecoderBlock& block = m.blocks[layer];
    multiply(block.qkv, quantize(&Rows::x, normed(block.input_norm)), qkv_.data());
    if (step.count == 1 || step.all) {
      share(step.batch * m.n_kv_head, [&](int64_t i) {
        for (int64_t row = i / m.n_kv_head * step.count, end = row + step.count; row < end; ++row) {
          append(step, block, layer, row, i % m.n_kv_head);
          attend(step, thread, layer, row, i % m.n_kv_head, row);
        }
      });
      if (layer == last_layer && !step.logits) return;
    } else {
      share(rows * m.n_kv_head, [&](int64_t i) { append(step, block, layer, i / m.n_kv_head, i % m.n_kv_head); });
      barrier.wait();
      if (layer < last_layer) {
        const int64_t blocks = ceil_div(step.count, kQueries), tasks = step.batch * m.n_head * blocks;
        for (int64_t i = index; i < tasks; i += threads)  // interleaved, because later blocks see more keys
          attend_block(step, thread, layer, i / blocks / m.n_head, i / blocks % m.n_head, i % blocks * kQueries);
      } else {  // the last layer needs only the last token's output
        if (!step.logits) return;
        share(step.batch * m.n_kv_head, [&](int64_t i) {
          const int64_t b = i / m.n_kv_head;
          attend(step, thread, layer, (b + 1) * step.count - 1, i % m.n_kv_head, b);
        });
        for (int64_t b = 0; index == 0 && b < step.batch; ++b)
          std::copy_n(x + ((b + 1) * step.count - 1) * m.n_embd, m.n_embd, x + b * m.n_embd);
        rows = step.batch;
      }
    }
    barrier.wait();

    multiply(block.o, quantize(&Rows::attn_out, [&](int64_t i) { return &attn_out_[i * width]; }), x, x);
    multiply(block.gate_up, quantize(&Rows::x, normed(block.post_norm)), hidden_.data());
    const Rows& quantized = each_row([&](Rows& out, int64_t i) {
      for (size_t s = 0; s < block.down.size(); ++s)
        out.hidden[s].quantize(i, &hidden_[i * m.n_hidden + s * block.down[s].K]);
    });
    for (size_t s = 0; s < block.down.size(); ++s) multiply_own(block.down[s], quantized.hidden[s], x, x);
    barrier.wait();
  }
  if (!m.fine_head) return multiply(m.head, quantize(&Rows::x, normed(m.norm)), step.logits);

  // Row 2 i is x; row 2 i + 1 is what the int8 values of row 2 i leave of it. The logits are the sum of both.
  const Rows& both = each_row([&](Rows& out, int64_t i) {
    float* const rest = normed(m.norm)(i);
    out.x.quantize(2 * i, rest);
    const int8_t* const q = &out.x.q[2 * i * row_bytes(out.x.quads)];
    for (int64_t k = 0; k < m.n_embd; ++k) rest[k] -= static_cast<float>(q[k]) * out.x.scale[2 * i];
    out.x.quantize(2 * i + 1, rest);
  });
  rows *= 2;
  multiply(m.head, both.x, logits_.data());
  const int64_t N = m.head.N, first = N * index / threads, last = N * (index + 1) / threads;
  for (int64_t i = 0; i < rows / 2; ++i) {
    const float *of_x = &logits_[2 * i * N], *of_rest = of_x + N;
    for (int64_t n = first; n < last; ++n) step.logits[i * N + n] = of_x[n] + of_rest[n];
  }
}

// For one key/value head of a token: applies QK-norm and RoPE to the key and its queries, then adds the key and the
// value to the caches.
void Decoder::append(const Step& step, const DecoderBlock& block, int64_t layer, int64_t row, int64_t kv_head) {
  const DecoderModel& m = model_;
  const int64_t size = m.head_dim, group = m.n_head / m.n_kv_head, pos = step.pos + row % step.count;
  float* const qkv = &qkv_[row * (m.n_head + 2 * m.n_kv_head) * size];
  float* const key = qkv + (m.n_head + kv_head) * size;
  const auto norm_and_rope = [&](float* x, const float* weight) {
    if (weight) floats().rms_norm(x, weight, size, m.norm_eps, x);
    floats().rope(x, m.cos + pos * size / 2, m.sin + pos * size / 2, size / 2);
  };
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) norm_and_rope(qkv + h * size, block.q_norm);
  norm_and_rope(key, block.k_norm);
  const int64_t at = cache_row(step, layer, row / step.count, kv_head) + pos;
  write_cache(step.keys, at, size, key);
  write_cache(step.values, at, size, key + m.n_kv_head * size);
}

// Attention of one token in all heads that share a key/value head, into row `out` of attn_out_.
void Decoder::attend(const Step& step, Thread& thread, int64_t layer, int64_t row, int64_t kv_head, int64_t out) {
  const DecoderModel& m = model_;
  const int64_t size = m.head_dim, group = m.n_head / m.n_kv_head, count = step.pos + row % step.count + 1;
  const int64_t at = cache_row(step, layer, row / step.count, kv_head);
  const int64_t next = at + step.length;  // the next head's rows
  const Cache &keys = step.keys, &values = step.values;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const float* q = &qkv_[(row * (m.n_head + 2 * m.n_kv_head) + h) * size];
    float *scratch = thread.scratch.data(), *y = &attn_out_[(out * m.n_head + h) * size];
    if (keys.int8)
      floats().attend_int8(q, keys.int8 + at * size, keys.scales + at, values.int8 + at * size, values.scales + at,
                           count, size, scratch, y, keys.int8 + next * size);
    else
      floats().attend(q, keys.floats + at * size, nullptr, values.floats + at * size, nullptr, count, size, scratch, y,
                      keys.floats + next * size);
  }
}

// Attention of up to kQueries tokens of sequence b, starting at `first`, in one head.
void Decoder::attend_block(const Step& step, Thread& thread, int64_t layer, int64_t b, int64_t head, int64_t first) {
  const DecoderModel& m = model_;
  const int64_t size = m.head_dim, queries = std::min<int64_t>(kQueries, step.count - first);
  const int64_t stride = (m.n_head + 2 * m.n_kv_head) * size, pos = step.pos + first;
  const int64_t at = cache_row(step, layer, b, head / (m.n_head / m.n_kv_head));
  const float* keys = read_cache(step.keys, at, pos + queries, size, thread.keys.data());
  const float* values = read_cache(step.values, at, pos + queries, size, thread.values.data());
  const int64_t row = b * step.count + first;
  floats().attend_block(&qkv_[row * stride + head * size], stride, queries, pos, keys, values, size,
                        thread.scratch.data(), &attn_out_[(row * m.n_head + head) * size], m.n_head * size);
}

// The first row (of head_dim) of the caches that belongs to sequence b and one head.
int64_t Decoder::cache_row(const Step& step, int64_t layer, int64_t b, int64_t kv_head) const {
  return ((layer * step.batch + b) * model_.n_kv_head + kv_head) * step.length;
}

}  // namespace owlet
