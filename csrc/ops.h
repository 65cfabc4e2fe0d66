// What the operators and the decoders of all devices share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/DimVector.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "decoder.h"
#include "kernels/kernels.h"

namespace owlet {

// The shapes of packed weights; Int is int64_t or c10::SymInt.
template <typename Int>
c10::SmallVector<Int, at::kDimVectorStaticSize> panel_shape(const Int& N, const Int& K) {
  return {(N + kPanelRows - 1) / kPanelRows, (K + 3) / 4, kPanelRows, 4};
}

template <typename Int>
c10::SmallVector<Int, at::kDimVectorStaticSize> tile_shape(const Int& N, const Int& K) {
  return {(N + kTileRows - 1) / kTileRows, (K + kTileK - 1) / kTileK, kTileRows, kTileK};
}

Activation parse_activation(std::string_view name);

inline at::Tensor contiguous(const std::optional<at::Tensor>& t) { return t ? t->contiguous() : at::Tensor(); }

inline const float* data_or_null(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// Checks every argument of int8_linear and returns y, not filled. Shapes may be symbolic: when torch.compile traces,
// only this runs.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                      std::string_view activation);

// int8 (N, K) on any device -> tile_shape(N, K), zero past N and K.
at::Tensor pack_tiles(const at::Tensor& w);

// Rows idx (...) int64 of a packed matrix, times their scales: fp32 (..., K). packed: panels (uint8, on the CPU alone)
// or tiles (int8). Indices are checked on the CPU; a GPU would have to wait for that.
at::Tensor int8_rows(const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& idx, int64_t K);

// ---- decoders, as Python sees them

using Matrix = std::pair<at::Tensor, at::Tensor>;  // packed, scale
// input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up, down
using Block = std::tuple<at::Tensor, Matrix, std::optional<at::Tensor>, std::optional<at::Tensor>, Matrix, at::Tensor,
                         Matrix, std::vector<Matrix>>;

// A decoder's model: checks its sizes and tensors and keeps the tensors alive. Backend has
//   Linear, Packed (the type of its packed weights), packed_shape(N, K)
//   kDevice, kAlignment (in bytes), kHeadDimStep, kMaxHeadDim
//   readable(t), which is t, or a copy that the kernels can read.
template <typename Backend>
class CheckedModel {
 public:
  CheckedModel(int64_t n_embd, int64_t n_head, int64_t n_kv_head, int64_t head_dim, int64_t n_hidden, double norm_eps,
               const at::Tensor& cos, const at::Tensor& sin, const Matrix& embedding, const std::vector<Block>& blocks,
               const at::Tensor& norm, const Matrix& head, bool fine_head)
      : device_(cos.device()), vocab_size_(head.second.numel()), block_size_(cos.dim() == 2 ? cos.size(0) : 0) {
    const std::pair<const char*, int64_t> sizes[] = {
        {"n_embd", n_embd}, {"n_head", n_head}, {"n_kv_head", n_kv_head}, {"head_dim", head_dim},
        {"n_hidden", n_hidden}};
    for (const auto& [name, size] : sizes)
      TORCH_CHECK(1 <= size && size <= kMaxK, name, " must be 1 to ", kMaxK, ", got ", size);
    TORCH_CHECK(n_head % n_kv_head == 0, "n_head must be a multiple of n_kv_head, got ", n_head, " and ", n_kv_head);
    TORCH_CHECK(head_dim % Backend::kHeadDimStep == 0 && head_dim <= Backend::kMaxHeadDim,
                "head_dim must be a multiple of ", Backend::kHeadDimStep, ", at most ", Backend::kMaxHeadDim,
                ", got ", head_dim);
    TORCH_CHECK(!blocks.empty(), "blocks must be 1 or more, got 0");
    TORCH_CHECK(device_.type() == Backend::kDevice, "cos must be on ", Backend::kDevice, ", got ", device_);
    const int64_t width = n_head * head_dim;
    model_ = {n_embd, n_head, n_kv_head, head_dim, n_hidden, static_cast<float>(norm_eps),
              floats("cos", cos, {block_size_, head_dim / 2}), floats("sin", sin, {block_size_, head_dim / 2}),
              matrix("embedding", embedding, vocab_size_, n_embd), {}, floats("norm", norm, {n_embd}),
              matrix("head", head, vocab_size_, n_embd), fine_head};
    const size_t slices = std::get<7>(blocks[0]).size();
    TORCH_CHECK(slices > 0 && n_hidden % slices == 0, "down must have 1 or more slices of equal size, got ", slices);
    TORCH_CHECK(Backend::kDevice == at::kCPU || (slices == 1 && !fine_head), "slices and fine_head are for CPUs");
    for (const auto& [input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up, down] : blocks) {
      TORCH_CHECK(down.size() == slices, "down must have ", slices, " slices in every block, got ", down.size());
      model_.blocks.push_back({floats("input_norm", input_norm, {n_embd}),
                               matrix("qkv", qkv, width + 2 * n_kv_head * head_dim, n_embd),
                               q_norm ? floats("q_norm", *q_norm, {head_dim}) : nullptr,
                               k_norm ? floats("k_norm", *k_norm, {head_dim}) : nullptr,
                               matrix("o", o, n_embd, width), floats("post_norm", post_norm, {n_embd}),
                               matrix("gate_up", gate_up, 2 * n_hidden, n_embd, Activation::swiglu),
                               {}});
      for (const Matrix& slice : down)
        model_.blocks.back().down.push_back(matrix("down", slice, n_embd, n_hidden / static_cast<int64_t>(slices)));
    }
  }

 protected:
  void expect(const char* name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) const {
    TORCH_CHECK(t.scalar_type() == dtype && t.device() == device_ && t.is_contiguous() && t.sizes() == shape, name,
                " must be contiguous ", dtype, " ", shape, " on ", device_, ", got ", t.scalar_type(), " ", t.sizes(),
                " on ", t.device());
    TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % Backend::kAlignment == 0 || t.numel() == 1, name,
                " must start at a multiple of ", Backend::kAlignment, " bytes");
  }
  at::Device device_;
  int64_t vocab_size_, block_size_;
  DecoderModelOf<typename Backend::Linear> model_;

 private:
  const at::Tensor& hold(const char* name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) {
    held_.push_back(Backend::readable(t));
    expect(name, held_.back(), dtype, shape);
    return held_.back();
  }

  const float* floats(const char* name, const at::Tensor& t, at::IntArrayRef shape) {
    return hold(name, t, at::kFloat, shape).template const_data_ptr<float>();
  }

  typename Backend::Linear matrix(const char* name, const Matrix& m, int64_t N, int64_t K,
                                  Activation activation = Activation::none) {
    TORCH_CHECK(K <= kMaxK, name, ": K must be at most ", kMaxK, ", got ", K);
    using Packed = typename Backend::Packed;
    const at::Tensor packed = hold(name, m.first, c10::CppTypeToScalarType<Packed>::value, Backend::packed_shape(N, K));
    return {N, K, packed.const_data_ptr<Packed>(), floats(name, m.second, {N}), nullptr, activation};
  }
  std::vector<at::Tensor> held_;
};

template <typename Decoder>
pybind11::class_<Decoder, std::shared_ptr<Decoder>> define_decoder(pybind11::module_& m, const char* name, const char* what) {
  using pybind11::arg;
  return pybind11::class_<Decoder, std::shared_ptr<Decoder>>(m, name, what)
      .def(pybind11::init<int64_t, int64_t, int64_t, int64_t, int64_t, double, const at::Tensor&, const at::Tensor&,
                          const Matrix&, const std::vector<Block>&, const at::Tensor&, const Matrix&, bool>(),
           pybind11::kw_only(), arg("n_embd"), arg("n_head"), arg("n_kv_head"), arg("head_dim"), arg("n_hidden"),
           arg("norm_eps"), arg("cos"), arg("sin"), arg("embedding"), arg("blocks"), arg("norm"), arg("head"),
           arg("fine_head") = false);
}

namespace cuda { void define(pybind11::module_& m); }  // the decoder for CUDA

}  // namespace owlet
