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

Tensor aligned(const std::optional<Tensor>& t) { return t ? aligned(*t) : Tensor(); }

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, std::string_view activation) {
  const Tensor y = new_output(x, packed, scale, bias, residual, activation);
  if (y.numel() == 0) return y;
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t K = x.size(-1), tokens = x.numel() / K;
  const Tensor x_ = aligned(x), packed_ = aligned(packed), scale_ = scale.contiguous();
  const Tensor bias_ = contiguous(bias), residual_ = aligned(residual);
  const Tensor q = at::empty({scratch_bytes(tokens, K)}, x.options().dtype(at::kChar));
  const Tensor x_scale = at::empty({tokens}, x.options().dtype(at::kFloat));
  const Linear weights{scale.numel(), K, packed_.const_data_ptr<int8_t>(), scale_.const_data_ptr<float>(),
                       data_or_null(bias_), parse_activation(activation)};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const void* added = residual_.defined() ? residual_.const_data_ptr() : nullptr;
    C10_CUDA_CHECK(int8_linear<T>({static_cast<const T*>(x_.const_data_ptr()), tokens}, weights,
                                  static_cast<const T*>(added), static_cast<T*>(y.mutable_data_ptr()),
                                  {q.mutable_data_ptr<int8_t>(), x_scale.mutable_data_ptr<float>()},
                                  c10::cuda::getCurrentCUDAStream()));
  };
  if (x.scalar_type() == at::kFloat) run(float{});
  if (x.scalar_type() == at::kHalf) run(__half{});
  if (x.scalar_type() == at::kBFloat16) run(__nv_bfloat16{});
  return y;
}

struct CudaBackend {
  using Linear = cuda::Linear;
  using Packed = int8_t;
  static constexpr auto kDevice = at::kCUDA;
  static constexpr int64_t kAlignment = 16, kHeadDimStep = cuda::kHeadDimStep, kMaxHeadDim = cuda::kMaxHeadDim;
  static at::DimVector packed_shape(int64_t N, int64_t K) { return tile_shape(N, K); }
  static Tensor readable(const Tensor& t) { return aligned(t); }
};

class CudaDecoder : public CheckedModel<CudaBackend> {
 public:
  using CheckedModel::CheckedModel;
  // tokens (B, 1), pos (1) int64; keys, values (n_layer, B, n_kv_head, length, head_dim) -> logits (B, 1, vocab_size).
  // The values of tokens and pos are not checked, because reading them would wait for the GPU.
  Tensor forward(const Tensor& tokens, const Tensor& pos, const Tensor& keys, const Tensor& values) const {
    const Tensor tokens_ = aligned(tokens);
    const int64_t B = tokens_.size(0), layers = model_.blocks.size();
    expect("tokens", tokens_, at::kLong, {B, 1});
    expect("pos", pos, at::kLong, {1});
    const int64_t length = keys.dim() == 5 ? keys.size(3) : 0;
    expect("keys", keys, at::kFloat, {layers, B, model_.n_kv_head, length, model_.head_dim});
    expect("values", values, at::kFloat, keys.sizes());
    const c10::cuda::CUDAGuard guard(device_);
    const auto floats = at::TensorOptions().device(device_).dtype(at::kFloat);
    const int64_t width = model_.n_head * model_.head_dim, qkv_width = width + 2 * model_.n_kv_head * model_.head_dim;
    const int64_t widest = std::max({model_.n_embd, width, model_.n_hidden});
    // allocated in every call: the allocator keeps the memory of a captured graph apart from all other
    const Tensor logits = at::empty({B, 1, vocab_size_}, floats), x = at::empty({B, model_.n_embd}, floats);
    const Tensor qkv = at::empty({B, qkv_width}, floats), attn_out = at::empty({B, width}, floats);
    const Tensor hidden = at::empty({B, model_.n_hidden}, floats), scale = at::empty({B}, floats);
    const Tensor q = at::empty({scratch_bytes(B, widest)}, floats.dtype(at::kChar));
    C10_CUDA_CHECK(decode(model_,
                          {tokens_.const_data_ptr<int64_t>(), pos.const_data_ptr<int64_t>(), B,
                           keys.mutable_data_ptr<float>(), values.mutable_data_ptr<float>(), length,
                           logits.mutable_data_ptr<float>()},
                          {x.mutable_data_ptr<float>(), qkv.mutable_data_ptr<float>(),
                           attn_out.mutable_data_ptr<float>(), hidden.mutable_data_ptr<float>(),
                           {q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>()}},
                          c10::cuda::getCurrentCUDAStream()));
    return logits;
  }
};

}  // namespace

void define(pybind11::module_& m) {
  namespace py = pybind11;
  define_decoder<CudaDecoder>(m, "CudaDecoder", "A whole int8 model for one token per sequence, without the host.")
      .def("forward", &CudaDecoder::forward, py::arg("tokens"), py::arg("pos"), py::arg("keys"), py::arg("values"),
           py::call_guard<py::gil_scoped_release>(),
           "Logits (B, 1, vocab_size) after tokens (B, 1) int64 at pos (1,) int64; adds them to the caches.");
}

}  // namespace owlet::cuda

TORCH_LIBRARY_IMPL(owlet, CUDA, m) {
  m.impl("int8_linear", owlet::cuda::linear);
  m.impl("pack_int8", owlet::pack_tiles);
  m.impl("int8_rows", owlet::int8_rows);
}
