#include "decoder.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "kernels/numerics.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Also compile a function for wider vectors and choose when the library is loaded. Sums run in 16
// lanes whatever the width, so that all give the same result.
#if defined(__x86_64__) && defined(__GLIBC__)
#define OWLET_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define OWLET_CLONES
#endif

namespace owlet {

namespace {

constexpr int kLanes = 16;

float sum_of(const float* lanes) {
  float sum[kLanes];
  std::copy_n(lanes, kLanes, sum);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

OWLET_CLONES
float dot(const float* a, const float* b, int64_t size) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
  for (int l = 0; i + l < size; ++l) lanes[l] += a[i + l] * b[i + l];
  return sum_of(lanes);
}

OWLET_CLONES
void add_scaled(const float* a, float scale, int64_t size, float* y) {
  for (int64_t i = 0; i < size; ++i) y[i] += scale * a[i];
}

// y = x / rms(x) * weight; y may be x.
OWLET_CLONES
void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y) {
  const float inverse = 1.0f / std::sqrt(dot(x, x, size) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) y[i] = x[i] * inverse * weight[i];
}

// Rotates the pairs (x[i], x[i + half]) by one position's angles.
void rope(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

// scores -> exp(scores - max), and returns one over their sum. A NaN among them makes all NaN.
OWLET_CLONES
float softmax(float* scores, int64_t size) {
  float high = scores[0];
  for (int64_t i = 1; i < size; ++i) high = scores[i] > high ? scores[i] : high;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += scores[i + l] = exp_approx(exp_range(scores[i + l] - high));
  for (int l = 0; i + l < size; ++l) lanes[l] += scores[i + l] = exp_approx(exp_range(scores[i + l] - high));
  return 1.0f / sum_of(lanes);
}

void read_row(const Int8Linear& table, int64_t row, int64_t size, float* y) {
  const int64_t quads = (size + 3) / 4;
  const uint8_t* packed = table.packed + row / kPanelRows * quads * kQuadBytes + row % kPanelRows * 4;
  for (int64_t k = 0; k < size; ++k)
    y[k] = static_cast<float>(packed[k / 4 * kQuadBytes + k % 4] - 128) * table.scale[row];
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

// Each thread normalizes and quantizes the shared vectors for itself: that is quicker than to have
// one do it and the others wait.
struct Decoder::Thread {
  explicit Thread(const DecoderModel& m)
      : normed(m.n_embd), scores(0), x(1, m.n_embd), mixed(1, m.n_head * m.head_dim), hidden(1, m.n_hidden) {}

  std::vector<float> normed, scores;
  QuantizedTokens x, mixed, hidden;
};

Decoder::Decoder(DecoderModel model)
    : model_(std::move(model)),
      x_(model_.n_embd),
      qkv_((model_.n_head + 2 * model_.n_kv_head) * model_.head_dim),
      mixed_(model_.n_head * model_.head_dim),
      hidden_(model_.n_hidden) {}

Decoder::~Decoder() = default;

void Decoder::forward(int64_t token, int64_t pos, float* keys, float* values, int64_t length,
                      int threads, float* logits) {
  kernel();  // the choice of instruction set may throw: not in the parallel region
  while (static_cast<int>(threads_.size()) < threads) threads_.push_back(std::make_unique<Thread>(model_));
  for (int t = 0; t < threads; ++t)
    if (static_cast<int64_t>(threads_[t]->scores.size()) < length) threads_[t]->scores.resize(length);

#ifdef _OPENMP
  std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier = std::make_unique<Barrier>(omp_get_num_threads());  // the team may be smaller than asked for
    const int index = omp_get_thread_num();
    run(*threads_[index], *barrier, index, omp_get_num_threads(), token, pos, keys, values, length, logits);
  }
#else
  Barrier barrier(1);
  run(*threads_[0], barrier, 0, 1, token, pos, keys, values, length, logits);
#endif
}

void Decoder::run(Thread& thread, Barrier& barrier, int index, int threads, int64_t token, int64_t pos,
                  float* keys, float* values, int64_t length, float* logits) {
  const DecoderModel& m = model_;
  // This thread's panels of a matrix, always the same ones.
  const auto multiply = [&](const Int8Linear& linear, const QuantizedTokens& x, const float* residual, float* y) {
    const int64_t panels = linear.tasks(1);
    linear.forward(x, residual, panels * index / threads, panels * (index + 1) / threads, y);
  };
  const auto normed = [&](const float* weight) -> const QuantizedTokens& {
    rms_norm(x_.data(), weight, m.n_embd, m.norm_eps, thread.normed.data());
    thread.x.quantize(0, thread.normed.data());
    return thread.x;
  };

  if (index == 0) read_row(m.embedding, token, m.n_embd, x_.data());
  barrier.wait();
  const int64_t layer_size = m.n_kv_head * length * m.head_dim;
  for (const DecoderBlock& block : m.blocks) {
    multiply(block.qkv, normed(block.input_norm), nullptr, qkv_.data());
    barrier.wait();
    for (int64_t g = index; g < m.n_kv_head; g += threads)
      attend(thread, block, g, pos, keys + g * length * m.head_dim, values + g * length * m.head_dim);
    keys += layer_size, values += layer_size;
    barrier.wait();
    thread.mixed.quantize(0, mixed_.data());
    multiply(block.o, thread.mixed, x_.data(), x_.data());
    barrier.wait();
    multiply(block.gate_up, normed(block.post_norm), nullptr, hidden_.data());
    barrier.wait();
    thread.hidden.quantize(0, hidden_.data());
    multiply(block.down, thread.hidden, x_.data(), x_.data());
    barrier.wait();
  }
  multiply(m.head, normed(m.norm), nullptr, logits);
}

// One key/value head and the query heads it serves. keys, values: (length, head_dim).
void Decoder::attend(Thread& thread, const DecoderBlock& block, int64_t kv_head, int64_t pos,
                     float* keys, float* values) {
  const DecoderModel& m = model_;
  const int64_t size = m.head_dim, group = m.n_head / m.n_kv_head;
  const float *cos = m.cos + pos * size / 2, *sin = m.sin + pos * size / 2;

  float *k = keys + pos * size, *v = values + pos * size;
  std::copy_n(&qkv_[(m.n_head + kv_head) * size], size, k);
  std::copy_n(&qkv_[(m.n_head + m.n_kv_head + kv_head) * size], size, v);
  if (block.k_norm) rms_norm(k, block.k_norm, size, m.norm_eps, k);
  rope(k, cos, sin, size / 2);

  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  float* scores = thread.scores.data();
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    float* q = &qkv_[h * size];
    if (block.q_norm) rms_norm(q, block.q_norm, size, m.norm_eps, q);
    rope(q, cos, sin, size / 2);
    for (int64_t p = 0; p <= pos; ++p) scores[p] = dot(q, keys + p * size, size) * scale;
    const float inverse = softmax(scores, pos + 1);
    float* y = &mixed_[h * size];
    std::fill_n(y, size, 0.0f);
    for (int64_t p = 0; p <= pos; ++p) add_scaled(values + p * size, scores[p] * inverse, size, y);
  }
}

}  // namespace owlet
