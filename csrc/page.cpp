// What a page of lib/page.py calls, compiled to WebAssembly: one model, and the text that it writes.
#ifdef __wasm__
#include <algorithm>
#include <cstdlib>
#include <optional>

#include "writer.h"

#define EXPORT(name) extern "C" __attribute__((export_name(#name)))

namespace {

using namespace owlet;

// The arrays of int8.py, joined by lib/page.py: each starts at a multiple of kLine, rows and columns of matrices are
// padded to whole panels, which are packed where they lie.
struct File : CpuLayout {
  explicit File(char* bytes) : at(bytes) {}
  char* at;
  template <typename T>
  T* take(int64_t count) {
    auto* array = reinterpret_cast<T*>(at);
    at += row_bytes(ceil_div(count * sizeof(T), 4));
    return array;
  }
  float number(const char*) { return *take<float>(1); }
  const float* floats(const char*, int64_t rows, int64_t columns) { return take<float>(rows * columns); }
  Int8Linear matrix(const char*, int64_t N, int64_t K) {
    const int64_t bytes = packed_bytes(N, K), panel = panel_bytes(K);
    auto* const packed = take<uint8_t>(bytes);
    std::vector<int8_t> rows(panel);
    for (uint8_t* p = packed; p < packed + bytes; p += panel) {
      std::copy_n(p, panel, reinterpret_cast<uint8_t*>(rows.data()));
      pack_panels(rows.data(), kPanelRows, panel / kPanelRows, 0, 1, p);
    }
    return {{N, K, packed, take<float>(N), Activation::none}};
  }
  void require(bool condition, const char*, const char*, int64_t) {
    if (!condition) std::abort();
  }
};

constexpr int64_t kLongest = 2048;  // tokens of context: the cache of a published model's 8,192 would fill a phone

std::vector<int64_t> stops, tokens;
std::optional<Decoder> decoder;
std::optional<Cache> cache;
std::optional<Writer> writer;

}  // namespace

EXPORT(allocate) char* allocate(uint32_t bytes) { return static_cast<char*>(std::aligned_alloc(kLine, bytes)); }

// Reads the model from memory of `allocate`, which it keeps. The caller fills in the `count` tokens that end a text.
EXPORT(load) int64_t* load(char* bytes, int32_t count) {
  File file(bytes);
  const Sizes sizes = *file.take<Sizes>(1);
  decoder.emplace(read_model(file, sizes));
  cache.emplace(decoder->model, 1, std::min(sizes.block_size, kLongest));
  stops.resize(count);
  return stops.data();
}

// Room for a text of so many tokens. The caller fills in its beginning.
EXPORT(text) int64_t* text(int32_t count) {
  writer.reset();
  tokens.assign(count, 0);
  return tokens.data();
}

EXPORT(start) void start(float temperature, double top_p, uint32_t seed) {
  writer.emplace(CachedModel{&*decoder, &*cache}, std::nullopt, Sampling{temperature, 0, top_p, 1, seed}, stops, 8,
                 tokens.data(), 1, tokens.size());
}

// Adds tokens at `end`, at least one and no more after `seconds`; returns the new end, or -1 where the model's numbers
// overflow.
EXPORT(write) int32_t write_text(int32_t end, double seconds) { return writer->write(end, tokens.size(), seconds, 1); }

EXPORT(ended) bool ended() { return writer->ended(); }
#endif
