// The part of CUDA that csrc/cuda uses, on a CPU, for tests without a GPU. The threads of a block run in turn, in a new
// random order each round and some warps more often than others, and switch only where they wait for each other. So
// results that depend on an order that nothing guarantees change, and sanitizers see every memory access.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i)
    c += static_cast<int8_t>(static_cast<unsigned>(a) >> (8 * i)) * static_cast<int8_t>(static_cast<unsigned>(b) >> (8 * i));
  return c;
}
inline int2 make_int2(int x, int y) { return {x, y}; }

using std::max;
using std::min;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;
constexpr int cudaDevAttrMultiProcessorCount = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// a low number, so that every block has several tiles
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 2, cudaSuccess; }

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline void __trap() { std::abort(); }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  std::unique_ptr<char[]> stack;
  jmp_buf where;
  bool begun, done;
  std::vector<std::vector<Copy>> groups;  // groups of asynchronous copies; the last one is open
};

struct Barrier {
  int arrived = 0;
  unsigned phase = 0;
  void wait(int threads);
};

constexpr size_t kStack = 256 << 10;
inline std::vector<Thread> threads;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<std::array<std::array<int, 6>, kWarp>> exchanged;  // by the lanes of each warp
inline jmp_buf scheduler;
inline bool progress;
inline const std::function<void()>* body;

inline int lane() { return threadIdx.x % kWarp; }
inline int warp() { return threadIdx.x / kWarp; }
inline Thread& self() { return threads[threadIdx.x]; }

// Unlike swapcontext, this makes no system call for the signal mask, which would take most of the time.
inline void yield() {
  if (!_setjmp(self().where)) _longjmp(scheduler, 1);
}

inline void Barrier::wait(int threads) {
  progress = true;
  const unsigned now = phase;
  if (++arrived == threads) {
    arrived = 0;
    ++phase;
    return;
  }
  while (phase == now) yield();
}

inline void wait_for_warp() { warp_barriers[warp()].wait(kWarp); }

// All lanes store their values; then each returns read(the values of the whole warp).
template <typename Read>
auto exchange(std::array<int, 6> mine, Read read) {
  auto& values = exchanged[warp()];
  values[lane()] = mine;
  wait_for_warp();
  const auto result = read(values);
  wait_for_warp();  // before a lane overwrites them
  return result;
}

inline void entry() {
  (*body)();
  self().done = progress = true;
  yield();
}

inline void resume() {
  Thread& thread = self();
  if (_setjmp(scheduler)) return;  // yield() comes back here
  if (thread.begun) _longjmp(thread.where, 1);
  thread.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get();
  context.uc_stack.ss_size = kStack;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

inline void run_block() {
  const int count = blockDim.x;
  for (int i = 0; i < count; ++i) {
    threads[i].begun = threads[i].done = false;
    threads[i].groups.assign(1, {});
  }
  static std::mt19937 random(1);
  std::vector<int> order(count);
  std::vector<unsigned> pause(warp_barriers.size());  // rounds that a warp skips, on average, per round that it runs
  for (int i = 0; i < count; ++i) order[i] = i;
  for (unsigned& rounds : pause) rounds = random() % 3 * 4;
  for (bool all = false; !order.empty(); all = !progress) {
    std::shuffle(order.begin(), order.end(), random);
    std::vector<bool> sits_out(pause.size());
    for (size_t warp = 0; warp < pause.size(); ++warp) sits_out[warp] = !all && random() % (1 + pause[warp]);
    progress = false;
    for (const int i : order) {
      if (sits_out[i / kWarp]) continue;
      threadIdx = dim3(i);
      resume();
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](int i) { return threads[i].done; }), order.end());
    if (all && !progress) {
      std::fputs("threads wait for others that never come\n", stderr);
      std::abort();
    }
  }
}

inline void run(dim3 grid, int threads_per_block, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim = grid;
  blockDim = dim3(threads_per_block);
  for (int i = threads.size(); i < threads_per_block; ++i) {
    threads.emplace_back();
    threads.back().stack.reset(new char[kStack]);
  }
  block_barrier = {};
  warp_barriers.assign((threads_per_block + kWarp - 1) / kWarp, {});
  exchanged.resize(warp_barriers.size());
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block();
    }
}

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier.wait(blockDim.x); }
inline void __syncwarp() { emulator::wait_for_warp(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) == 4);
  std::array<int, 6> mine{};
  std::memcpy(mine.data(), &value, 4);
  return emulator::exchange(mine, [&](auto& values) {
    T other;
    std::memcpy(&other, values[emulator::lane() ^ mask].data(), 4);
    return other;
  });
}
