// The functions of csrc/cuda/primitives.cuh that use PTX. Matrix fragments have the layout of the PTX ISA ("Matrix
// Fragments for mma.m16n8k32").
#pragma once

namespace owlet::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t, Arguments... arguments) {
  emulator::run(grid, threads, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline void mma(int (&c)[4], int a0, int a1, int a2, int a3, int b0, int b1) {
  const auto byte = [](int word, int i) { return static_cast<int8_t>(static_cast<unsigned>(word) >> (8 * i)); };
  const auto sums = emulator::exchange({a0, a1, a2, a3, b0, b1}, [&](auto& lanes) {
    std::array<int, 4> sums{};
    for (int i = 0; i < 4; ++i) {
      const int row = emulator::lane() / 4 + 8 * (i / 2), column = 2 * (emulator::lane() % 4) + i % 2;
      for (int k = 0; k < 32; ++k) {
        const int word_of_k = k % 16 / 4;  // the lane, of four, that holds k
        sums[i] += byte(lanes[row % 8 * 4 + word_of_k][row / 8 + 2 * (k / 16)], k % 4) *
                   byte(lanes[column * 4 + word_of_k][4 + k / 16], k % 4);
      }
    }
    return sums;
  });
  for (int i = 0; i < 4; ++i) c[i] += sums[i];
}

inline int4 load_weights(const int8_t* p) { return *reinterpret_cast<const int4*>(p); }

// Copies as late as the waits allow.
inline void copy_async(void* shared, const void* global) { emulator::self().groups.back().push_back({shared, global}); }

inline void end_group() { emulator::self().groups.emplace_back(); }

template <int pending>
void wait_groups() {
  auto& groups = emulator::self().groups;
  while (groups.size() > pending + 1) {  // one more for the open group
    for (const auto& [to, from] : groups.front()) *static_cast<int4*>(to) = *static_cast<const int4*>(from);
    groups.erase(groups.begin());
  }
}

}  // namespace owlet::cuda
