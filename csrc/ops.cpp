// The kernels as torch operators, torch.ops.owlet.*: schemas, checks, registration; and the Python
// module whose import registers them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <optional>
#include <string_view>

#include "cuda/layout.h"
#include "decoder.h"
#include "huge_pages.h"
#include "kernels/kernels.h"
#include "ops.h"
#include "probe.h"

namespace owlet {

using at::Tensor;

Activation parse_activation(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "silu") return Activation::silu;
  if (name == "swiglu") return Activation::swiglu;
  TORCH_CHECK(false, "activation must be none, silu or swiglu, got ", name);
}

namespace {

c10::SymDimVector packed_shape(const c10::SymInt& N, const c10::SymInt& K) {
  return {(N + kPanelRows - 1) / kPanelRows, (K + 3) / 4, kPanelRows, 4};
}

c10::SymDimVector tiled_shape(const c10::SymInt& N, const c10::SymInt& K) {
  using namespace cuda;
  return {(N + kTileRows - 1) / kTileRows, (K + kTileK - 1) / kTileK, kTileRows, kTileK};
}

void check(const char* name, const Tensor& t, at::ScalarType dtype, const Tensor& x,
           at::ArrayRef<c10::SymInt> shape) {
  TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK(t.device() == x.device(), name, " must be on x's device, ", x.device(), ", got ",
              t.device());
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.sym_size(i) == shape[i];
  TORCH_CHECK(same, name, " must have shape ", shape, ", got ", t.sym_sizes());
}

}  // namespace

Tensor new_output(const Tensor& x, const Tensor& packed, const Tensor& scale,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  std::string_view activation) {
  // int8 says that it is packed for CUDA: when torch.compile traces, the device does not
  const bool tiled = x.is_cuda() || (x.is_meta() && packed.scalar_type() == at::kChar);
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || (tiled && (dtype == at::kHalf || dtype == at::kBFloat16)), "x must be ",
              at::kFloat, tiled ? ", Half or BFloat16" : "", ", got ", dtype);
  TORCH_CHECK(x.dim() >= 1, "x must have shape (..., K), got a scalar");
  TORCH_CHECK(scale.dim() == 1, "scale must have shape (N), got ", scale.sym_sizes());
  const c10::SymInt K = x.sym_size(-1), N = scale.sym_size(0);
  TORCH_SYM_CHECK(K.sym_gt(0).sym_and(K.sym_le(kMaxK)), "K must be 1 to ", kMaxK,
                  ", for sums to fit int32, got ", K);
  check("packed", packed, tiled ? at::kChar : at::kByte, x, tiled ? tiled_shape(N, K) : packed_shape(N, K));
  check("scale", scale, at::kFloat, x, {N});
  if (bias) check("bias", *bias, at::kFloat, x, {N});

  c10::SymDimVector shape(x.sym_sizes());
  shape.back() = N;
  if (parse_activation(activation) == Activation::swiglu) {
    TORCH_SYM_CHECK((N % 2).sym_eq(0), "swiglu needs an even N, gate and up in turn, got ", N);
    shape.back() = N / 2;
  }
  if (residual) check("residual", *residual, dtype, x, shape);
  return at::empty_symint(shape, x.options());
}

namespace {

// Work worth waking a thread for, in multiply-adds.
constexpr int64_t kGrain = 1 << 16;

Tensor contiguous(const std::optional<Tensor>& t) { return t ? t->contiguous() : Tensor(); }

const float* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

Tensor int8_linear_cpu(const Tensor& x, const Tensor& packed, const Tensor& scale,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                       std::string_view activation) {
  const Tensor y = new_output(x, packed, scale, bias, residual, activation);
  if (y.numel() == 0) return y;

  const int64_t K = x.size(-1), tokens = x.numel() / K;
  const Tensor x_ = x.contiguous(), packed_ = packed.contiguous(), scale_ = scale.contiguous();
  const Tensor bias_ = contiguous(bias), residual_ = contiguous(residual);

  QuantizedTokens q(tokens, K);
  at::parallel_for(0, tokens, 1 + kGrain / K, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) q.quantize(t, x_.const_data_ptr<float>() + t * K);
  });

  const Int8Linear linear{scale.numel(), packed_.const_data_ptr<uint8_t>(),
                          scale_.const_data_ptr<float>(), data_or_null(bias_),
                          parse_activation(activation)};
  const int64_t tasks = linear.tasks(tokens);
  const int64_t task_work = tokens * linear.N * K / tasks;
  at::parallel_for(0, tasks, 1 + kGrain / (1 + task_work), [&](int64_t begin, int64_t end) {
    linear.forward(q, tokens, data_or_null(residual_), begin, end, y.mutable_data_ptr<float>());
  });
  return y;
}

// Checks w and returns the packed tensor, not yet filled.
Tensor new_packed(const Tensor& w) {
  TORCH_CHECK(w.scalar_type() == at::kChar, "w must be ", at::kChar, ", got ", w.scalar_type());
  TORCH_CHECK(w.dim() == 2, "w must have shape (N, K), got ", w.sym_sizes());
  const c10::SymInt N = w.sym_size(0), K = w.sym_size(1);
  TORCH_SYM_CHECK(N.sym_gt(0).sym_and(K.sym_gt(0)), "w must not be empty, got ", w.sym_sizes());
  return at::empty_symint(packed_shape(N, K), w.options().dtype(at::kByte));
}

void pack_into(const Tensor& w, const Tensor& packed) {
  const Tensor w_ = w.contiguous();
  TORCH_CHECK(w.is_cpu() && w.scalar_type() == at::kChar && w.dim() == 2 && packed.is_cpu() &&
                  packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                  packed.sym_sizes() == c10::SymIntArrayRef(packed_shape(w.size(0), w.size(1))),
              "expected int8 (N, K) and contiguous uint8 (ceil(N / 64), ceil(K / 4), 64, 4) on the CPU, got ",
              w.scalar_type(), " ", w.sizes(), " and ", packed.scalar_type(), " ", packed.sizes());
  std::atomic<bool> symmetric = true;
  at::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    if (!pack_panels(w_.const_data_ptr<int8_t>(), w.size(0), w.size(1), begin, end,
                     packed.mutable_data_ptr<uint8_t>()))
      symmetric = false;
  });
  TORCH_CHECK(symmetric, "w must lie in [-127, 127], got a -128");
}

Tensor pack_int8_cpu(const Tensor& w) {
  const Tensor packed = new_packed(w);
  pack_into(w, packed);
  return packed;
}

// Since it takes a system milliseconds to find huge pages, blocks that were given back are kept for
// whoever comes next: as many as hold one cache, keys and values.
class HugePages {
 public:
  struct Block {
    void* memory;
    int64_t bytes;
  };

  Block take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = kept_.begin(); block != kept_.end(); ++block)
      if (block->bytes >= bytes) {
        const Block found = *block;
        kept_.erase(block);
        return found;
      }
    void* memory = huge_alloc(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, memory, "no memory for ", bytes, " bytes");
    return {memory, bytes};
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(block);
    if (kept_.size() <= 2) return;
    std::free(kept_.front().memory);
    kept_.erase(kept_.begin());
  }

 private:
  std::mutex mutex_;
  std::vector<Block> kept_;
};

// uint8 (bytes), not filled; small ones are not worth a huge page.
Tensor huge_pages(int64_t bytes) {
  if (bytes < 2 * kHugePage) return at::empty({bytes}, at::kByte);
  static HugePages& pages = *new HugePages;  // never destroyed: tensors may outlive whatever else there is
  const HugePages::Block block = pages.take(bytes);
  return at::from_blob(block.memory, {bytes}, [block](void*) { pages.give(block); }, at::kByte);
}

// ---- the decoder, as Python sees it

// Checks the model's tensors and keeps them alive for the decoder.
class PyDecoder {
 public:
  PyDecoder(int64_t n_embd, int64_t n_head, int64_t n_kv_head, int64_t head_dim, int64_t n_hidden, double norm_eps,
            const Tensor& cos, const Tensor& sin, const Matrix& embedding, const std::vector<Block>& blocks,
            const Tensor& norm, const Matrix& head)
      : n_layer_(blocks.size()), n_kv_head_(n_kv_head), head_dim_(head_dim),
        vocab_size_(head.second.numel()), block_size_(cos.numel() * 2 / head_dim) {
    const int64_t width = n_head * head_dim;
    DecoderModel model{n_embd, n_head, n_kv_head, head_dim, n_hidden, static_cast<float>(norm_eps),
                       weights("cos", cos, block_size_ * head_dim / 2), weights("sin", sin, block_size_ * head_dim / 2),
                       matrix("embedding", embedding, vocab_size_, n_embd), {}, weights("norm", norm, n_embd),
                       matrix("head", head, vocab_size_, n_embd)};
    for (const auto& [input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up, down] : blocks)
      model.blocks.push_back({weights("input_norm", input_norm, n_embd),
                              matrix("qkv", qkv, width + 2 * n_kv_head * head_dim, n_embd),
                              q_norm ? weights("q_norm", *q_norm, head_dim) : nullptr,
                              k_norm ? weights("k_norm", *k_norm, head_dim) : nullptr,
                              matrix("o", o, n_embd, width), weights("post_norm", post_norm, n_embd),
                              matrix("gate_up", gate_up, 2 * n_hidden, n_embd, Activation::swiglu),
                              matrix("down", down, n_embd, n_hidden)});
    decoder_ = std::make_unique<Decoder>(std::move(model));
  }

  // tokens (B, T) int64; keys, values (n_layer, B, n_kv_head, length, head_dim), float, or int8 with
  // scales (n_layer, B, n_kv_head, length) -> logits (B, 1, vocab_size) after each stream's last token.
  Tensor forward(const Tensor& tokens, int64_t pos, const Tensor& keys, const Tensor& values,
                 const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales) {
    TORCH_CHECK(tokens.scalar_type() == at::kLong && tokens.is_cpu() && tokens.dim() == 2 && tokens.numel() > 0,
                "tokens must be int64 (B, T) on the CPU, got ", tokens.scalar_type(), " ", tokens.sizes());
    const Tensor tokens_ = tokens.contiguous();
    const int64_t B = tokens.size(0), T = tokens.size(1), *token = tokens_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < B * T; ++i)
      TORCH_CHECK(0 <= token[i] && token[i] < vocab_size_, "token must be 0 to ", vocab_size_ - 1, ", got ", token[i]);
    const int64_t length = keys.dim() == 5 ? keys.size(3) : 0, room = std::min(length, block_size_) - T;
    TORCH_CHECK(0 <= pos && pos <= room, "pos must be 0 to ", room, ", got ", pos);
    TORCH_CHECK(key_scales.has_value() == value_scales.has_value(),
                "key_scales and value_scales must be given both or neither");
    const Tensor logits = at::empty({B, 1, vocab_size_}, tokens.options().dtype(at::kFloat));
    const Step step{token, B, T, T, pos, cache("keys", keys, key_scales, B, length),
                    cache("values", values, value_scales, B, length), length, logits.mutable_data_ptr<float>()};
    const std::lock_guard<std::mutex> lock(mutex_);
    decoder_->forward(step, at::get_num_threads());
    return logits;
  }

 private:
  static const float* floats(const char* name, const Tensor& t, int64_t size) {
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_cpu() && t.is_contiguous() && t.numel() == size, name,
                " must be ", size, " contiguous floats on the CPU, got ", t.scalar_type(), " ", t.sizes());
    return t.const_data_ptr<float>();
  }

  Cache cache(const char* name, const Tensor& t, const std::optional<Tensor>& scales, int64_t B, int64_t length) {
    const int64_t shape[] = {n_layer_, B, n_kv_head_, length, head_dim_};
    const auto dtype = scales ? at::kChar : at::kFloat;
    const auto expect = [&](const Tensor& got, at::ScalarType dtype, at::IntArrayRef shape) {
      TORCH_CHECK(got.scalar_type() == dtype && got.is_cpu() && got.is_contiguous() && got.sizes() == shape, name,
                  " must be contiguous ", dtype, " ", shape, " on the CPU, got ", got.scalar_type(), " ", got.sizes());
    };
    expect(t, dtype, shape);
    if (!scales) return {t.mutable_data_ptr<float>(), nullptr, nullptr};
    expect(*scales, at::kFloat, at::IntArrayRef(shape).slice(0, 4));
    return {nullptr, t.mutable_data_ptr<int8_t>(), scales->mutable_data_ptr<float>()};
  }

  const float* weights(const char* name, const Tensor& t, int64_t size) {
    held_.push_back(t);
    return floats(name, t, size);
  }

  Int8Linear matrix(const char* name, const Matrix& m, int64_t N, int64_t K,
                    Activation activation = Activation::none) {
    const auto& [packed, scale] = m;
    TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_cpu() && packed.is_contiguous() &&
                    packed.sym_sizes() == c10::SymIntArrayRef(packed_shape(N, K)),
                name, " must be pack_int8's of (", N, ", ", K, "), got ", packed.scalar_type(), " ", packed.sizes());
    TORCH_CHECK(K <= kMaxK, name, ": K must be at most ", kMaxK, ", got ", K);
    held_.push_back(packed);
    return {N, packed.const_data_ptr<uint8_t>(), weights(name, scale, N), nullptr, activation};
  }

  int64_t n_layer_, n_kv_head_, head_dim_, vocab_size_, block_size_;
  std::vector<Tensor> held_;
  std::mutex mutex_;  // Python's own lock is not held while the decoder works
  std::unique_ptr<Decoder> decoder_;
};

}  // namespace
}  // namespace owlet

TORCH_LIBRARY(owlet, m) {
  m.def("int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias=None, "
        "Tensor? residual=None, str activation=\"none\") -> Tensor");
  m.def("pack_int8(Tensor w) -> Tensor");
}

TORCH_LIBRARY_IMPL(owlet, CPU, m) {
  m.impl("int8_linear", owlet::int8_linear_cpu);
  m.impl("pack_int8", owlet::pack_int8_cpu);
}

TORCH_LIBRARY_IMPL(owlet, Meta, m) {
  m.impl("int8_linear", owlet::new_output);
  m.impl("pack_int8", owlet::new_packed);
}

PYBIND11_MODULE(owlet_kernels, m) {
  m.doc() = "Registers torch.ops.owlet.int8_linear and torch.ops.owlet.pack_int8.";
  m.def("isa", [] { return owlet::kernel().name; }, "The instruction set in use.");
  m.def("isas", owlet::kernel_names, "The instruction sets this CPU supports, best first.");
  namespace py = pybind11;
  using owlet::PyDecoder;
  owlet::define_decoder<PyDecoder>(m, "Decoder", "A whole int8 model, in one parallel region.")
      .def("forward", &PyDecoder::forward, py::arg("tokens"), py::arg("pos"), py::arg("keys"), py::arg("values"),
           py::arg("key_scales") = py::none(), py::arg("value_scales") = py::none(),
           py::call_guard<py::gil_scoped_release>(),
           "Logits (B, 1, vocab_size) after the last of tokens (B, T) int64; adds them to the caches.");
  m.def("pack_into", owlet::pack_into, py::arg("w"), py::arg("packed"), "pack_int8 into memory that is there.");
  m.def("huge_pages", owlet::huge_pages, py::arg("bytes"), "An uninitialised uint8 tensor, on huge pages if it is large.");
  m.def("use_isa", owlet::use_kernel, "Use this instruction set from now on; for tests.");
  m.def("read_bandwidth", owlet::read_bandwidth, py::arg("bytes"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "GB/s at which threads can read this many bytes of memory.");
  m.def("dot_peak", owlet::dot_peak, py::arg("threads"), py::arg("isa"), py::call_guard<py::gil_scoped_release>(),
        "GOP/s of the instruction set's int8 dot product, from registers.");
#ifdef OWLET_CUDA
  owlet::cuda::define(m);
#endif
}
