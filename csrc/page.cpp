// What a page of to_html.py calls, compiled to WebAssembly: one model, and the text that it writes.
#ifdef __wasm__
#include <algorithm>
#include <cstdlib>
#include <optional>
#include <random>

#include "writer.h"

#define EXPORT(name) extern "C" __attribute__((export_name(#name)))

namespace {

using namespace owlet;

struct Header {
  int32_t n_embd, n_head, n_kv_head, head_dim, n_hidden, vocab_size, block_size, n_layer, qk_norm, slices, fine_head,
      tied, stops;
  float norm_eps;
};

// The arrays that model_file of to_html.py has joined. Each starts at a multiple of kLine.
struct File {
  const char* at;
  template <typename T>
  const T* take(int64_t count) {
    const auto* array = reinterpret_cast<const T*>(at);
    at += row_bytes(ceil_div(count * sizeof(T), 4));
    return array;
  }
  Int8Linear matrix(int64_t N, int64_t K, Activation activation = Activation::none) {
    const float* scale = take<float>(N);
    return {{N, K, take<uint8_t>(ceil_div(N, kPanelRows) * ceil_div(K, 4) * kQuadBytes), scale, nullptr, activation}};
  }
};

constexpr int64_t kLongest = 2048;  // tokens of context: the cache of a published model's 8,192 would fill a phone

Header h;
std::vector<int64_t> stops, tokens;
std::vector<float> keys, values;
std::optional<Decoder> decoder;
std::optional<Writer> writer;

}  // namespace

EXPORT(allocate) char* allocate(uint32_t bytes) { return static_cast<char*>(std::aligned_alloc(kLine, bytes)); }

// Reads the model from memory of `allocate`, which it keeps.
EXPORT(load) void load(const char* bytes) {
  File file{bytes};
  h = *file.take<Header>(1);
  const int64_t* const ends = file.take<int64_t>(h.stops);
  stops.assign(ends, ends + h.stops);
  const int64_t C = h.n_embd, width = h.n_head * h.head_dim, half = h.head_dim / 2;
  DecoderModel model{C, h.n_head, h.n_kv_head, h.head_dim, h.n_hidden, h.norm_eps,
                     file.take<float>(h.block_size * half), file.take<float>(h.block_size * half),
                     file.matrix(h.vocab_size, C), {}, file.take<float>(C), {}, h.fine_head != 0};
  model.head = h.tied ? model.embedding : file.matrix(h.vocab_size, C);
  for (int layer = 0; layer < h.n_layer; ++layer) {
    model.blocks.push_back({file.take<float>(C), file.matrix(width + 2 * h.n_kv_head * h.head_dim, C),
                            h.qk_norm ? file.take<float>(h.head_dim) : nullptr,
                            h.qk_norm ? file.take<float>(h.head_dim) : nullptr, file.matrix(C, width),
                            file.take<float>(C), file.matrix(2 * h.n_hidden, C, Activation::swiglu), {}});
    for (int s = 0; s < h.slices; ++s) model.blocks.back().down.push_back(file.matrix(C, h.n_hidden / h.slices));
  }
  keys.resize(h.n_layer * h.n_kv_head * std::min<int64_t>(h.block_size, kLongest) * h.head_dim);
  values.resize(keys.size());
  decoder.emplace(std::move(model));
}

// Room for a text of so many tokens. The caller fills in its beginning.
EXPORT(text) int64_t* text(int32_t count) {
  writer.reset();
  tokens.assign(count, 0);
  return tokens.data();
}

// The seed is sample.py's: that of a torch generator, from which generate.py draws the writer's own.
EXPORT(start) void start(float temperature, float top_p, uint32_t seed) {
  std::mt19937 random(seed);
  const uint64_t high = random(), drawn = (high << 32 | random()) % INT64_MAX;
  const Reader reader{&*decoder, {keys.data(), nullptr, nullptr}, {values.data(), nullptr, nullptr},
                      std::min<int64_t>(h.block_size, kLongest)};
  writer.emplace(reader, std::nullopt, Sampling{temperature, 0, top_p, 1, drawn}, h.vocab_size, stops, 8, tokens.data(),
                 1, tokens.size());
}

// Adds tokens at `end`, at least one and no more after `seconds`; returns the new end.
EXPORT(write) int32_t write_text(int32_t end, double seconds) { return writer->write(end, tokens.size(), seconds, 1); }

EXPORT(ended) bool ended() { return writer->ended(); }
#endif
