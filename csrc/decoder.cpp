#include "decoder.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <thread>

#include "kernels/float_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace owlet {

namespace {

const FloatMath& floats() { return *kernel().floats; }

// Tokens that go through the model together (or one of each stream, where those are more): enough to
// read the weights seldom, few enough for what lies between two products to stay in the cache.
constexpr int64_t kMaxRows = 256;

void read_row(const Int8Linear& table, int64_t row, int64_t size, float* y) {
  const int64_t quads = (size + 3) / 4;
  const uint8_t* packed = table.packed + row / kPanelRows * quads * kQuadBytes + row % kPanelRows * 4;
  for (int64_t k = 0; k < size; ++k)
    y[k] = static_cast<float>(packed[k / 4 * kQuadBytes + k % 4] - 128) * table.scale[row];
}

// Row `row` of a cache := x.
void write_cache(const Cache& cache, int64_t row, int64_t size, const float* x) {
  if (cache.int8)
    cache.scales[row] = quantize_row(x, size, cache.int8 + row * size).scale;
  else
    std::copy_n(x, size, cache.floats + row * size);
}

// `count` rows of a cache from `row` on, as floats: where they are, or in scratch.
const float* read_cache(const Cache& cache, int64_t row, int64_t count, int64_t size, float* scratch) {
  if (!cache.int8) return cache.floats + row * size;
  floats().dequantize(cache.int8 + row * size, cache.scales + row, count, size, scratch);
  return scratch;
}

}  // namespace

// Threads meet here some forty times a token, so they spin; but where there are more threads than
// free cores, whoever waits long lets others run.
//
// What a thread wrote before wait() is seen by all after it: every arrival is a read-modify-write of
// arrived_ with release and acquire, so the last to arrive has seen all the others' writes, and its
// release of phase_ hands them on to whoever leaves. arrived_ is reset before that release, so nobody
// can arrive for the next phase before it is 0.
class Decoder::Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins >= kSpins)
        std::this_thread::yield();
      else
        pause();
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some 50 us

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

// What the products take.
struct Decoder::Rows {
  Rows(const DecoderModel& m, int64_t rows)
      : x(rows, m.n_embd), mixed(rows, m.n_head * m.head_dim), hidden(rows, m.n_hidden) {}

  QuantizedTokens x, mixed, hidden;
};

struct Decoder::Thread {
  explicit Thread(const DecoderModel& m) : quantized(m, 1), normed(m.n_embd) {}

  Rows quantized;  // of a single token, which each thread quantizes for itself
  std::vector<float> normed, scratch, keys, values;
};

Decoder::Decoder(DecoderModel model) : model_(std::move(model)) {}

Decoder::~Decoder() = default;

void Decoder::prepare(const Step& step, int threads) {
  kernel();  // the choice of instruction set may throw: not in the parallel region
  const DecoderModel& m = model_;
  const int64_t rows = step.streams * step.count;
  if (rows > rows_) {
    x_.resize(rows * m.n_embd);
    qkv_.resize(rows * (m.n_head + 2 * m.n_kv_head) * m.head_dim);
    mixed_.resize(rows * m.n_head * m.head_dim);
    hidden_.resize(rows * m.n_hidden);
    quantized_ = std::make_unique<Rows>(m, rows);
    rows_ = rows;  // last: what is above may throw
  }
  while (static_cast<int>(threads_.size()) < threads) threads_.push_back(std::make_unique<Thread>(m));
  for (int t = 0; t < threads; ++t) {
    threads_[t]->scratch.resize(attention_scratch(step.length, m.head_dim));
    if (step.keys.int8) threads_[t]->keys.resize(step.length * m.head_dim);
    if (step.values.int8) threads_[t]->values.resize(step.length * m.head_dim);
  }
}

void Decoder::forward(Step step, int threads) {
  const int64_t end = step.pos + step.count, chunk = std::max<int64_t>(1, kMaxRows / step.streams);
  float* const logits = step.logits;
  for (; step.pos < end; step.pos += step.count, step.tokens += step.count) {
    step.count = std::min(chunk, end - step.pos);
    step.logits = step.pos + step.count == end ? logits : nullptr;
    prepare(step, threads);
#ifdef _OPENMP
    std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      barrier = std::make_unique<Barrier>(omp_get_num_threads());  // the team may be smaller than asked for
      const int index = omp_get_thread_num();
      run(step, *threads_[index], *barrier, index, omp_get_num_threads());
    }
#else
    Barrier barrier(1);
    run(step, *threads_[0], barrier, 0, 1);
#endif
  }
}

void Decoder::run(const Step& step, Thread& thread, Barrier& barrier, int index, int threads) {
  const DecoderModel& m = model_;
  const int64_t width = m.n_head * m.head_dim, last_layer = static_cast<int64_t>(m.blocks.size()) - 1;
  int64_t rows = step.streams * step.count;

  // This thread's share of so many things, always the same.
  const auto share = [&](int64_t things, auto&& body) {
    for (int64_t i = things * index / threads; i < things * (index + 1) / threads; ++i) body(i);
  };
  // A single row every thread quantizes for itself, quicker than to wait for another; more are shared.
  const auto quantize = [&](QuantizedTokens Rows::*which, auto&& row) -> const QuantizedTokens& {
    QuantizedTokens& out = (rows == 1 ? thread.quantized : *quantized_).*which;
    if (rows == 1) {
      out.quantize(0, row(0));
    } else {
      share(rows, [&](int64_t i) { out.quantize(i, row(i)); });
      barrier.wait();
    }
    return out;
  };
  const auto normed = [&](const float* weight) {
    return [&, weight](int64_t i) {
      floats().rms_norm(&x_[i * m.n_embd], weight, m.n_embd, m.norm_eps, thread.normed.data());
      return thread.normed.data();
    };
  };
  const auto multiply = [&](const Int8Linear& linear, const QuantizedTokens& x, const float* residual, float* y) {
    const int64_t tasks = linear.tasks(rows);
    linear.forward(x, rows, residual, tasks * index / threads, tasks * (index + 1) / threads, y);
    barrier.wait();
  };

  share(rows, [&](int64_t i) {
    const int64_t token = step.tokens[i / step.count * step.stride + i % step.count];
    read_row(m.embedding, token, m.n_embd, &x_[i * m.n_embd]);
  });
  barrier.wait();

  for (int64_t layer = 0; layer <= last_layer; ++layer) {
    const DecoderBlock& block = m.blocks[layer];
    multiply(block.qkv, quantize(&Rows::x, normed(block.input_norm)), nullptr, qkv_.data());
    if (step.count == 1) {
      share(rows * m.n_kv_head, [&](int64_t i) {
        append(step, block, layer, i / m.n_kv_head, i % m.n_kv_head);
        attend_last(step, thread, layer, i / m.n_kv_head, i % m.n_kv_head);
      });
      if (layer == last_layer && !step.logits) return;
    } else {
      share(rows * m.n_kv_head,
            [&](int64_t i) { append(step, block, layer, i / m.n_kv_head, i % m.n_kv_head); });
      barrier.wait();
      if (layer < last_layer) {
        const int64_t blocks = (step.count + kQueries - 1) / kQueries, tasks = step.streams * m.n_head * blocks;
        for (int64_t i = index; i < tasks; i += threads)  // later blocks see more: deal them out in turn
          attend_block(step, thread, layer, i / blocks / m.n_head, i / blocks % m.n_head, i % blocks * kQueries);
      } else {  // of the last layer only what follows the last token is wanted
        if (!step.logits) return;
        share(step.streams * m.n_kv_head,
              [&](int64_t i) { attend_last(step, thread, layer, i / m.n_kv_head, i % m.n_kv_head); });
        for (int64_t b = 0; index == 0 && b < step.streams; ++b)
          std::copy_n(&x_[((b + 1) * step.count - 1) * m.n_embd], m.n_embd, &x_[b * m.n_embd]);
        rows = step.streams;
      }
    }
    barrier.wait();

    multiply(block.o, quantize(&Rows::mixed, [&](int64_t i) { return &mixed_[i * width]; }), x_.data(), x_.data());
    multiply(block.gate_up, quantize(&Rows::x, normed(block.post_norm)), nullptr, hidden_.data());
    multiply(block.down, quantize(&Rows::hidden, [&](int64_t i) { return &hidden_[i * m.n_hidden]; }), x_.data(),
             x_.data());
  }
  multiply(m.head, quantize(&Rows::x, normed(m.norm)), nullptr, step.logits);
}

// For one token and key/value head: norms and rotates the key and its queries, and adds key and value
// to the caches.
void Decoder::append(const Step& step, const DecoderBlock& block, int64_t layer, int64_t row, int64_t kv_head) {
  const DecoderModel& m = model_;
  const int64_t size = m.head_dim, group = m.n_head / m.n_kv_head, pos = step.pos + row % step.count;
  float* const qkv = &qkv_[row * (m.n_head + 2 * m.n_kv_head) * size];
  float* const key = qkv + (m.n_head + kv_head) * size;
  const auto turn = [&](float* x, const float* weight) {
    if (weight) floats().rms_norm(x, weight, size, m.norm_eps, x);
    floats().rope(x, m.cos + pos * size / 2, m.sin + pos * size / 2, size / 2);
  };
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) turn(qkv + h * size, block.q_norm);
  turn(key, block.k_norm);
  const int64_t at = cache_row(step, layer, row / step.count, kv_head) + pos;
  write_cache(step.keys, at, size, key);
  write_cache(step.values, at, size, key + m.n_kv_head * size);
}

// The last token of a stream, in all heads that one key/value head serves.
void Decoder::attend_last(const Step& step, Thread& thread, int64_t layer, int64_t stream, int64_t kv_head) {
  const DecoderModel& m = model_;
  const int64_t size = m.head_dim, group = m.n_head / m.n_kv_head, count = step.pos + step.count;
  const int64_t at = cache_row(step, layer, stream, kv_head), row = (stream + 1) * step.count - 1;
  const int64_t next = at + step.length;  // the next head's
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const float* q = &qkv_[(row * (m.n_head + 2 * m.n_kv_head) + h) * size];
    float *scratch = thread.scratch.data(), *y = &mixed_[(stream * m.n_head + h) * size];
    const Cache &keys = step.keys, &values = step.values;
    if (keys.int8)
      floats().attend_int8(q, keys.int8 + at * size, keys.scales + at, values.int8 + at * size, values.scales + at,
                           count, size, scratch, y, keys.int8 + next * size);
    else
      floats().attend(q, keys.floats + at * size, values.floats + at * size, count, size, scratch, y,
                      keys.floats + next * size);
  }
}

// Up to kQueries tokens of a stream from `first` on, in one head.
void Decoder::attend_block(const Step& step, Thread& thread, int64_t layer, int64_t stream, int64_t head,
                           int64_t first) {
  const DecoderModel& m = model_;
  const int64_t size = m.head_dim, queries = std::min<int64_t>(kQueries, step.count - first);
  const int64_t stride = (m.n_head + 2 * m.n_kv_head) * size, pos = step.pos + first;
  const int64_t at = cache_row(step, layer, stream, head / (m.n_head / m.n_kv_head));
  const float* keys = read_cache(step.keys, at, pos + queries, size, thread.keys.data());
  const float* values = read_cache(step.values, at, pos + queries, size, thread.values.data());
  const int64_t row = stream * step.count + first;
  floats().attend_block(&qkv_[row * stride + head * size], stride, queries, pos, keys, values, size,
                        thread.scratch.data(), &mixed_[(row * m.n_head + head) * size], m.n_head * size);
}

// Where a stream's keys or values of one head begin in the caches, in rows of head_dim.
int64_t Decoder::cache_row(const Step& step, int64_t layer, int64_t stream, int64_t kv_head) const {
  return ((layer * step.streams + stream) * model_.n_kv_head + kv_head) * step.length;
}

}  // namespace owlet
