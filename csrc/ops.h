// What the operators have in common on all devices.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace owlet {

Activation parse_activation(std::string_view name);

// Checks every argument of int8_linear and returns y, not yet filled. Shapes may be symbolic: when torch.compile
// traces, this is all that runs.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                      std::string_view activation);

// ---- decoders, as Python sees them

using Matrix = std::pair<at::Tensor, at::Tensor>;  // packed, scale
// input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up, down
using Block = std::tuple<at::Tensor, Matrix, std::optional<at::Tensor>, std::optional<at::Tensor>, Matrix, at::Tensor,
                         Matrix, Matrix>;

template <typename Decoder>
pybind11::class_<Decoder> define_decoder(pybind11::module_& m, const char* name, const char* what) {
  using pybind11::arg;
  return pybind11::class_<Decoder>(m, name, what)
      .def(pybind11::init<int64_t, int64_t, int64_t, int64_t, int64_t, double, const at::Tensor&, const at::Tensor&,
                          const Matrix&, const std::vector<Block>&, const at::Tensor&, const Matrix&>(),
           pybind11::kw_only(), arg("n_embd"), arg("n_head"), arg("n_kv_head"), arg("head_dim"), arg("n_hidden"),
           arg("norm_eps"), arg("cos"), arg("sin"), arg("embedding"), arg("blocks"), arg("norm"), arg("head"));
}

namespace cuda {
void define(pybind11::module_& m);  // the decoder for CUDA
}

}  // namespace owlet
