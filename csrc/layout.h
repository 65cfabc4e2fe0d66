// A model as a flat list of arrays: the order that `arrays` of int8.py makes, and the only place in C++ that reads it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace owlet {

// The first array.
struct Sizes {
  int64_t n_embd, n_head, n_kv_head, head_dim, n_hidden, vocab_size, block_size, n_layer, qk_norm, slices, fine_head,
      tied;
};

// The weights, on a CPU or a GPU. Norm weights and tables are float; Linear is an int8 matrix.
template <typename Linear>
struct DecoderBlockOf {
  const float* input_norm;  // (n_embd)
  Linear qkv;               // (n_head + 2 n_kv_head) * head_dim rows: q, k, v
  const float* q_norm;      // (head_dim), or null without QK-norm
  const float* k_norm;
  Linear o;
  const float* post_norm;    // (n_embd)
  Linear gate_up;            // swiglu: 2 n_hidden rows
  std::vector<Linear> down;  // one for each slice of the n_hidden channels; their results add up. On a GPU, one.
};

template <typename Linear>
struct DecoderModelOf : Sizes {
  float norm_eps;
  const float *cos, *sin;  // (block_size, head_dim / 2)
  std::vector<DecoderBlockOf<Linear>> blocks;
  const float* norm;  // (n_embd)
  Linear head;        // (vocab_size, n_embd). A fine head takes x in int8, then x's rounding error.
  Linear embedding;   // (vocab_size, n_embd), read by rows; tied: the head
  int64_t width() const { return n_head * head_dim; }
  int64_t group() const { return n_head / n_kv_head; }                      // query heads of a key/value head
  int64_t qkv_width() const { return (n_head + 2 * n_kv_head) * head_dim; }
};

// A Source provides the type Linear and
//   number(name), floats(name, rows, columns)      the next array
//   matrix(name, N, K)                             the next two: a matrix and its scales
//   require(condition, name, expected, got)        refuses a size
template <typename Source>
DecoderModelOf<typename Source::Linear> read_model(Source& source, const Sizes& sizes) {
  DecoderModelOf<typename Source::Linear> m{};
  static_cast<Sizes&>(m) = sizes;
  const std::pair<const char*, int64_t> widths[] = {{"n_embd", m.n_embd}, {"n_head", m.n_head},
                                                    {"n_kv_head", m.n_kv_head}, {"head_dim", m.head_dim},
                                                    {"n_hidden", m.n_hidden}};
  const std::string most = std::to_string(kMaxK);
  for (const auto& [name, size] : widths)
    source.require(1 <= size && size <= kMaxK, name, ("1 to " + most).c_str(), size);
  const std::pair<const char*, int64_t> counts[] = {
      {"vocab_size", m.vocab_size}, {"block_size", m.block_size}, {"n_layer", m.n_layer}};
  for (const auto& [name, size] : counts) source.require(1 <= size && size <= 1 << 20, name, "1 to 1048576", size);
  source.require(m.width() <= kMaxK, "n_head * head_dim", ("at most " + most).c_str(), m.width());
  source.require(m.n_head % m.n_kv_head == 0, "n_kv_head", "a divisor of n_head", m.n_kv_head);
  source.require(m.head_dim % Source::kHeadDimStep == 0 && m.head_dim <= Source::kMaxHeadDim, "head_dim",
                 Source::kHeadDims, m.head_dim);
  source.require(m.slices >= 1 && m.n_hidden % m.slices == 0, "slices", "a divisor of n_hidden", m.slices);

  m.norm_eps = source.number("norm_eps");
  m.cos = source.floats("cos", m.block_size, m.head_dim / 2);
  m.sin = source.floats("sin", m.block_size, m.head_dim / 2);
  for (int64_t layer = 0; layer < m.n_layer; ++layer) {
    auto& block = m.blocks.emplace_back();
    block.input_norm = source.floats("input_norm", 1, m.n_embd);
    block.qkv = source.matrix("qkv", m.qkv_width(), m.n_embd);
    if (m.qk_norm) {
      block.q_norm = source.floats("q_norm", 1, m.head_dim);
      block.k_norm = source.floats("k_norm", 1, m.head_dim);
    }
    block.o = source.matrix("o", m.n_embd, m.width());
    block.post_norm = source.floats("post_norm", 1, m.n_embd);
    block.gate_up = source.matrix("gate_up", 2 * m.n_hidden, m.n_embd);
    block.gate_up.activation = Activation::swiglu;
    for (int64_t slice = 0; slice < m.slices; ++slice)
      block.down.push_back(source.matrix("down", m.n_embd, m.n_hidden / m.slices));
  }
  m.norm = source.floats("norm", 1, m.n_embd);
  m.head = source.matrix("head", m.vocab_size, m.n_embd);
  m.embedding = m.tied ? m.head : source.matrix("embedding", m.vocab_size, m.n_embd);
  return m;
}

}  // namespace owlet
