// What the operators have in common on all devices.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string_view>

#include "kernels/kernels.h"

namespace owlet {

Activation parse_activation(std::string_view name);

// Checks every argument of int8_linear and returns y, not yet filled. Shapes may be symbolic: when torch.compile
// traces, this is all that runs.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                      std::string_view activation);

namespace cuda {
void define(pybind11::module_& m);  // the decoder for CUDA
}

}  // namespace owlet
