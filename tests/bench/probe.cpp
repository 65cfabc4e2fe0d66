// The limits of the machine, for benchmarks to compare the kernels with: the Python module owlet_probe.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../../csrc/huge_pages.h"
#include "../../csrc/kernels/amx.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace owlet {
namespace {

void check_threads(int threads) {
  constexpr int kMost = 1024;  // OpenMP ends the process when it cannot start all threads
  if (threads < 1 || threads > kMost)
    throw std::invalid_argument("threads must be 1 to " + std::to_string(kMost) + ", got " + std::to_string(threads));
}

// Seconds that work(t) takes for all t < threads, which start together. Without OpenMP, one thread does everything.
template <typename Work>
double seconds(int threads, const Work& work) {
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  double start = std::numeric_limits<double>::max(), end = 0;
#pragma omp parallel num_threads(threads) reduction(min : start) reduction(max : end)
  {
#pragma omp barrier
    start = now();
#pragma omp for schedule(static, 1) nowait
    for (int t = 0; t < threads; ++t) work(t);
    end = now();
  }
  return end - start;
}

// The best of several timings, because a disturbance can only make one slower.
template <typename Work>
double least_seconds(int threads, const Work& work) {
  constexpr int kTimings = 5;
  double least = std::numeric_limits<double>::max();
  for (int i = 0; i < kTimings; ++i) least = std::min(least, seconds(threads, work));
  return least;
}

// ---- reading

// The widest vector there is. For narrower ones, the compiler splits it.
using Vector = uint64_t __attribute__((vector_size(64)));
constexpr int64_t kStreams = 4, kChunk = kStreams * kLine;
static_assert(sizeof(Vector) == kLine);
constexpr int64_t kEnoughBytes = 128 << 20;  // per timing: milliseconds, so that starting the threads does not count

// Reads `size` bytes once, in four streams that are `stride` apart and advance by `step`. Prefetches `ahead` bytes
// further on.
#if defined(__x86_64__) && defined(__GLIBC__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void read(const char* p, int64_t size, int64_t stride, int64_t step, int64_t ahead) {
  Vector seen[kStreams] = {};
  for (int64_t i = 0; i < size; i += kChunk, p += step)
    for (int s = 0; s < kStreams; ++s) {
      __builtin_prefetch(p + s * stride + ahead);
      seen[s] ^= *reinterpret_cast<const Vector*>(p + s * stride);
    }
  const Vector all = seen[0] ^ seen[1] ^ seen[2] ^ seen[3];
  asm volatile("" : : "m"(all));  // makes the compiler believe that the value is used
}

// ---- multiplying

// Independent sums of a loop: at least latency times throughput of the instruction (5 x 2 or 3 x 4), and few enough for
// 16 registers to hold them and the operands.
constexpr int kSums = 12;
constexpr double kEnoughSeconds = 4e-3;  // per timing

// Makes the compiler believe that a register's value is used and then changes.
#if defined(__aarch64__)
#define OPAQUE(v) asm volatile("" : "+w"(v))
#else
#define OPAQUE(v) asm volatile("" : "+v"(v))
#endif

// Defines name(repeats) for an instruction set: a repeat adds w * a, by `add`, to each s of kSums sums.
#define DOT(name, target_isa, Values, Sums, one, add)              \
  __attribute__((target(target_isa))) void name(int64_t repeats) { \
    Values w = one, a = one;                                       \
    Sums sum[kSums] = {};                                          \
    for (int64_t i = 0; i < repeats; ++i)                          \
      _Pragma("GCC unroll 12") for (Sums& s : sum) {               \
        s = add;                                                   \
        OPAQUE(s);                                                 \
        OPAQUE(w); /* keeps the product in the loop */             \
      }                                                            \
  }

#if defined(__x86_64__)
DOT(dot_avx512_vnni, "avx512f,avx512vnni", __m512i, __m512i, _mm512_set1_epi8(1), _mm512_dpbusd_epi32(s, w, a))
DOT(dot_avx_vnni, "avx2,avxvnni", __m256i, __m256i, _mm256_set1_epi8(1), _mm256_dpbusd_avx_epi32(s, w, a))
// The values are already widened to 16 bits: how often that must be done depends on the kernel.
DOT(dot_avx2, "avx2", __m256i, __m256i, _mm256_set1_epi16(1), _mm256_add_epi32(s, _mm256_madd_epi16(w, a)))

#if defined(__linux__)
__attribute__((target("amx-tile,amx-int8")))
void dot_amx(int64_t repeats) {
  static constexpr TileConfig config = tile_config(kMaxTileTokens);
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < repeats; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}
#endif
#elif defined(__aarch64__)
DOT(dot_neon, "arch=armv8.2-a+dotprod", int8x16_t, int32x4_t, vdupq_n_s8(1), vdotq_s32(s, w, a))
#endif

constexpr int kGenericSums = 64;

void dot_generic(int64_t repeats) {
  int32_t sum[kGenericSums] = {};
  int8_t w[kGenericSums] = {}, a[kGenericSums] = {};
  for (int64_t i = 0; i < repeats; ++i) {
    for (int n = 0; n < kGenericSums; ++n) sum[n] += w[n] * a[n];
    asm volatile("" : : "r"(sum), "r"(w), "r"(a) : "memory");
  }
}

struct Dot {
  const char* isa;
  void (*run)(int64_t repeats);
  int products;  // per repeat
};

const Dot kDots[] = {
#if defined(__x86_64__)
#if defined(__linux__)
    {"amx", dot_amx, 4 * 16 * 16 * 64},
#endif
    {"avx512_vnni", dot_avx512_vnni, kSums * 64},
    {"avx_vnni", dot_avx_vnni, kSums * 32},
    {"avx2", dot_avx2, kSums * 16},
#elif defined(__aarch64__)
    {"neon", dot_neon, kSums * 16},
#endif
    {"generic", dot_generic, kGenericSums},
};

// GB/s at which the threads together read `bytes` of memory again and again, each its own share: the limit of decoding
// with that many bytes of weights.
double read_bandwidth(int64_t bytes, int threads) {
  check_threads(threads);
  const int64_t share = bytes / threads / kChunk * kChunk;
  if (share < kChunk)
    throw std::invalid_argument("bytes must be " + std::to_string(kChunk) + " a thread or more, got " +
                                std::to_string(bytes));
  const std::unique_ptr<char, void (*)(void*)> buffer(static_cast<char*>(huge_alloc(share * threads)), std::free);
  if (!buffer) throw std::bad_alloc();
  seconds(threads, [&](int t) {  // the first thread to touch a page gets it in memory near its core
    uint64_t random = t + 1;     // xorshift, because zeros may be read faster
    auto* words = reinterpret_cast<uint64_t*>(buffer.get() + t * share);
    for (int64_t i = 0; i < share / 8; ++i) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      words[i] = random;
    }
  });

  const int64_t repeats = std::max<int64_t>(1, kEnoughBytes / (share * threads));
  double least = std::numeric_limits<double>::max();
  for (const int64_t ahead : {0, 1024, 2048, 4096}) {
    const auto read_all = [&](int64_t stride, int64_t step) {
      return least_seconds(threads, [&](int t) {
        for (int64_t i = 0; i < repeats; ++i) read(buffer.get() + t * share, share, stride, step, ahead);
      });
    };
    least = std::min({least, read_all(kLine, kChunk), read_all(share / kStreams, kLine)});  // one stream; four apart
  }
  return static_cast<double>(share * threads * repeats) / least * 1e-9;
}

// GOP/s (a multiply-add is two operations) of the int8 dot product of an instruction set, from and to registers.
double dot_peak(int threads, const std::string& isa) {
  check_threads(threads);
  const auto isas = pybind11::module_::import("owlet_kernels").attr("isas")();  // asks the system for AMX's registers
  for (const Dot& dot : kDots)
    if (isa == dot.isa && isas.contains(isa)) {
      const pybind11::gil_scoped_release unlocked;
      int64_t repeats = 1;
      const auto run = [&](int) { dot.run(repeats); };
      while (least_seconds(1, run) < kEnoughSeconds) repeats *= 2;
      return 2.0 * static_cast<double>(repeats * dot.products * threads) / least_seconds(threads, run) * 1e-9;
    }
  throw std::invalid_argument("instruction set '" + isa + "' is unknown or not supported by this CPU");
}

}  // namespace
}  // namespace owlet

PYBIND11_MODULE(owlet_probe, m) {
  using pybind11::arg;
  m.def("read_bandwidth", owlet::read_bandwidth, arg("bytes"), arg("threads"),
        pybind11::call_guard<pybind11::gil_scoped_release>(), "GB/s at which threads can read this much memory.");
  m.def("dot_peak", owlet::dot_peak, arg("threads"), arg("isa"),
        "GOP/s of the instruction set's int8 dot product, from registers. ValueError if this CPU does not have it.");
}
