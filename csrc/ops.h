// What the operators and the decoders of CPUs and GPUs share.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "layout.h"

namespace owlet {

// Checks every argument of int8_linear but the weight's layout, and returns y, not filled.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& packed, at::ScalarType dtype, at::IntArrayRef packed_shape,
                      const at::Tensor& scale, const std::optional<at::Tensor>& residual, bool swiglu);

inline const float* data_or_null(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// A Source of read_model: an iterator over Python's tensors, which it keeps alive.
struct __attribute__((visibility("hidden"))) TensorSource {
  explicit TensorSource(pybind11::iterator arrays) : arrays(std::move(arrays)) {}
  at::Tensor next(const char* name, at::ScalarType dtype) {
    TORCH_CHECK(arrays != pybind11::iterator::sentinel(), name, " is missing");
    const at::Tensor t = arrays->cast<at::Tensor>();
    ++arrays;
    TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
    return t;
  }
  Sizes sizes() {
    const at::Tensor t = next("sizes", at::kLong).cpu().contiguous();
    TORCH_CHECK(t.numel() == sizeof(Sizes) / 8, "sizes must be ", sizeof(Sizes) / 8, " numbers");
    return *static_cast<const Sizes*>(t.const_data_ptr());
  }
  float number(const char* name) { return next(name, at::kFloat).item<float>(); }
  void end() const { TORCH_CHECK(arrays == pybind11::iterator::sentinel(), "there are more arrays than the sizes say"); }
  static void require(bool condition, const char* name, const char* expected, int64_t got) {
    TORCH_CHECK(condition, name, " must be ", expected, ", got ", got);
  }
  pybind11::iterator arrays;
  std::vector<at::Tensor> held;
};

namespace cuda { void define(pybind11::module_& m); }  // the decoder for CUDA

}  // namespace owlet
