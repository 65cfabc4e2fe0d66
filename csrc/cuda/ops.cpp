// The CUDA kernels as torch operators, and the decoder for Python.
#include "../ops.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "decoder.h"

namespace owlet::cuda {
namespace {

using at::Tensor;

// A contiguous tensor whose address allows loads of 16 bytes.
Tensor aligned(const Tensor& t) {
  const Tensor same = t.contiguous();
  return reinterpret_cast<uintptr_t>(same.const_data_ptr()) % 16 ? same.clone() : same;
}

at::DimVector tile_shape(int64_t N, int64_t K) {
  return {ceil_div(N, kTileRows), ceil_div(K, kTileK), kTileRows, kTileK};
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& residual,
              bool swiglu) {
  const int64_t K = x.size(-1), N = scale.numel();
  const Tensor y = new_output(x, weight, at::kChar, tile_shape(N, K), scale, residual, swiglu);
  if (y.numel() == 0) return y;
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t tokens = x.numel() / K;
  const Tensor x_ = aligned(x), weight_ = aligned(weight), scale_ = scale.contiguous();
  const Tensor residual_ = residual ? aligned(*residual) : Tensor();
  const Tensor q = at::empty({scratch_bytes(tokens, K)}, x.options().dtype(at::kChar));
  const Tensor x_scale = at::empty({tokens}, x.options());
  C10_CUDA_CHECK(int8_linear({x_.const_data_ptr<float>(), tokens},
                             {N, K, weight_.const_data_ptr<int8_t>(), scale_.const_data_ptr<float>(),
                              swiglu ? Activation::swiglu : Activation::none},
                             data_or_null(residual_), y.mutable_data_ptr<float>(),
                             {q.mutable_data_ptr<int8_t>(), x_scale.mutable_data_ptr<float>()},
                             c10::cuda::getCurrentCUDAStream()));
  return y;
}

struct CudaSource : TensorSource {
  using TensorSource::TensorSource;
  using Linear = cuda::Linear;
  static constexpr int64_t kHeadDimStep = cuda::kHeadDimStep, kMaxHeadDim = cuda::kMaxHeadDim;
  static constexpr const char* kHeadDims = "16, 32, ... 128";
  const Tensor& hold(const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
    held.push_back(aligned(next(name, dtype)));
    TORCH_CHECK(held.back().is_cuda() && held.back().numel() == c10::multiply_integers(shape), name, " must be ", shape,
                " on a GPU, got ", held.back().sizes(), " on ", held.back().device());
    return held.back();
  }
  const float* floats(const char* name, int64_t rows, int64_t columns) {
    return hold(name, at::kFloat, {rows, columns}).const_data_ptr<float>();
  }
  Linear matrix(const char* name, int64_t N, int64_t K) {
    const auto* packed = hold(name, at::kChar, tile_shape(N, K)).const_data_ptr<int8_t>();
    return {N, K, packed, floats(name, 1, N), Activation::none};
  }
};

class CudaDecoder {
 public:
  explicit CudaDecoder(const pybind11::iterable& arrays) : source_(pybind11::iter(arrays)), model_(read()) {}
  // tokens (B, 1), pos (1) int64; keys, values (n_layer, B, n_kv_head, length, head_dim) int8 with scales (..., length,
  // 1) -> logits (B, 1, vocab_size). The values of tokens and pos are not checked: reading them would wait for the GPU.
  Tensor forward(const Tensor& tokens, const Tensor& pos, const Tensor& keys, const Tensor& values,
                 const Tensor& key_scales, const Tensor& value_scales) const {
    const Tensor tokens_ = aligned(tokens);
    const int64_t B = tokens_.size(0), length = keys.dim() == 5 ? keys.size(3) : 0;
    const auto expect = [&](const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) {
      TORCH_CHECK(t.scalar_type() == dtype && t.device() == device() && t.is_contiguous() && t.sizes() == shape, name,
                  " must be contiguous ", dtype, " ", shape, " on ", device(), ", got ", t.scalar_type(), " ", t.sizes(),
                  " on ", t.device());
    };
    expect("tokens", tokens_, at::kLong, {B, 1});
    expect("pos", pos, at::kLong, {1});
    expect("keys", keys, at::kChar, {model_.n_layer, B, model_.n_kv_head, length, model_.head_dim});
    expect("values", values, at::kChar, keys.sizes());
    expect("key_scales", key_scales, at::kFloat, {model_.n_layer, B, model_.n_kv_head, length, 1});
    expect("value_scales", value_scales, at::kFloat, key_scales.sizes());
    const c10::cuda::CUDAGuard guard(device());
    const auto floats = at::TensorOptions().device(device()).dtype(at::kFloat);
    const int64_t widest = std::max({model_.n_embd, model_.width(), model_.n_hidden});
    // allocated in every call: the allocator keeps the memory of a captured graph apart from all other
    const Tensor logits = at::empty({B, 1, model_.vocab_size}, floats), x = at::empty({B, model_.n_embd}, floats);
    const Tensor qkv = at::empty({B, model_.qkv_width()}, floats), attn_out = at::empty({B, model_.width()}, floats);
    const Tensor hidden = at::empty({B, model_.n_hidden}, floats), scale = at::empty({B}, floats);
    const Tensor q = at::empty({scratch_bytes(B, widest)}, floats.dtype(at::kChar));
    C10_CUDA_CHECK(decode(model_,
                          {tokens_.const_data_ptr<int64_t>(), pos.const_data_ptr<int64_t>(), B,
                           keys.mutable_data_ptr<int8_t>(), values.mutable_data_ptr<int8_t>(),
                           key_scales.mutable_data_ptr<float>(), value_scales.mutable_data_ptr<float>(), length,
                           logits.mutable_data_ptr<float>()},
                          {x.mutable_data_ptr<float>(), qkv.mutable_data_ptr<float>(),
                           attn_out.mutable_data_ptr<float>(), hidden.mutable_data_ptr<float>(),
                           {q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>()}},
                          c10::cuda::getCurrentCUDAStream()));
    return logits;
  }

 private:
  DecoderModel read() {
    const Sizes sizes = source_.sizes();
    TORCH_CHECK(sizes.slices == 1 && !sizes.fine_head, "takes no products in parts");
    DecoderModel model = read_model(source_, sizes);
    source_.end();
    return model;
  }
  at::Device device() const { return source_.held[0].device(); }
  CudaSource source_;  // holds the arrays
  const DecoderModel model_;
};

}  // namespace

void define(pybind11::module_& m) {
  namespace py = pybind11;
  using py::arg;
  py::class_<CudaDecoder>(m, "CudaDecoder", "A whole int8 model for one token per sequence, without the host.")
      .def(py::init<const py::iterable&>(), arg("arrays"))
      .def("forward", &CudaDecoder::forward, arg("tokens"), arg("pos"), arg("keys"), arg("values"), arg("key_scales"),
           arg("value_scales"), py::call_guard<py::gil_scoped_release>(),
           "Logits (B, 1, vocab_size) after tokens (B, 1) int64 at pos (1,) int64; adds them to the caches.");
}

}  // namespace owlet::cuda

TORCH_LIBRARY_IMPL(owlet, CUDA, m) { m.impl("int8_linear", owlet::cuda::linear); }
