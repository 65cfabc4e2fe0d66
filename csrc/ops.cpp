// The kernels as torch operators, torch.ops.owlet.*: schemas, checks, registration. Importing the Python module
// registers them.
#include <ATen/Parallel.h>
#include <ATen/TensorIndexing.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>

#include "huge_pages.h"
#include "ops.h"
#include "writer.h"

namespace owlet {

using at::Tensor;

Activation parse_activation(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "silu") return Activation::silu;
  if (name == "swiglu") return Activation::swiglu;
  TORCH_CHECK(false, "activation must be none, silu or swiglu, got ", name);
}

namespace {

void check(const char* name, const Tensor& t, at::ScalarType dtype, const Tensor& x, at::ArrayRef<c10::SymInt> shape,
           const char* x_name = "x") {
  TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK(t.device() == x.device(), name, " must be on ", x_name, "'s device, ", x.device(), ", got ", t.device());
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.sym_size(i) == shape[i];
  TORCH_CHECK(same, name, " must have shape ", shape, ", got ", t.sym_sizes());
}

}  // namespace

Tensor new_output(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, std::string_view activation) {
  // While torch.compile traces, x is a meta tensor: then only the dtype tells what packed was made for.
  const bool tiled = x.is_cuda() || (x.is_meta() && packed.scalar_type() == at::kChar);
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || (tiled && (dtype == at::kHalf || dtype == at::kBFloat16)), "x must be ",
              at::kFloat, tiled ? ", Half or BFloat16" : "", ", got ", dtype);
  TORCH_CHECK(x.dim() >= 1, "x must have shape (..., K), got a scalar");
  TORCH_CHECK(scale.dim() == 1, "scale must have shape (N), got ", scale.sym_sizes());
  const c10::SymInt K = x.sym_size(-1), N = scale.sym_size(0);
  TORCH_SYM_CHECK(K.sym_gt(0).sym_and(K.sym_le(kMaxK)), "K must be 1 to ", kMaxK, ", for sums to fit int32, got ", K);
  check("packed", packed, tiled ? at::kChar : at::kByte, x, tiled ? tile_shape(N, K) : panel_shape(N, K));
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

// The multiply-adds that are worth waking a thread (docs/log.md, "Work per thread").
constexpr int64_t kGrain = 1 << 16;

Tensor int8_linear_cpu(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, std::string_view activation) {
  const Tensor y = new_output(x, packed, scale, bias, residual, activation);
  if (y.numel() == 0) return y;
  const int64_t K = x.size(-1), tokens = x.numel() / K;
  const Tensor x_ = x.contiguous(), packed_ = packed.contiguous(), scale_ = scale.contiguous();
  const Tensor bias_ = contiguous(bias), residual_ = contiguous(residual);

  QuantizedTokens q(tokens, K);
  at::parallel_for(0, tokens, 1 + kGrain / K, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) q.quantize(t, x_.const_data_ptr<float>() + t * K);
  });
  const Int8Linear linear{scale.numel(), K, packed_.const_data_ptr<uint8_t>(), scale_.const_data_ptr<float>(),
                          data_or_null(bias_), parse_activation(activation)};
  const int64_t tasks = linear.tasks(tokens), task_work = tokens * linear.N * K / tasks;
  at::parallel_for(0, tasks, 1 + kGrain / (1 + task_work), [&](int64_t begin, int64_t end) {
    linear.forward(q, tokens, data_or_null(residual_), begin, end, y.mutable_data_ptr<float>());
  });
  return y;
}

void check_weight(const Tensor& w) {
  TORCH_CHECK(w.scalar_type() == at::kChar, "w must be ", at::kChar, ", got ", w.scalar_type());
  TORCH_CHECK(w.dim() == 2, "w must have shape (N, K), got ", w.sym_sizes());
  TORCH_SYM_CHECK(w.sym_size(0).sym_gt(0).sym_and(w.sym_size(1).sym_gt(0)), "w must not be empty, got ", w.sym_sizes());
}

// Panels for w, not filled. A trace has no device, so torch.compile would see panels for a GPU too: pack outside it.
Tensor new_panels(const Tensor& w) {
  check_weight(w);
  return at::empty_symint(panel_shape(w.sym_size(0), w.sym_size(1)), w.options().dtype(at::kByte));
}

Tensor fill_panels(const Tensor& w, const Tensor& panels) {
  const Tensor w_ = w.contiguous();
  std::atomic<bool> symmetric = true;
  at::parallel_for(0, panels.size(0), 1, [&](int64_t begin, int64_t end) {
    if (!pack_panels(w_.const_data_ptr<int8_t>(), w.size(0), w.size(1), begin, end, panels.mutable_data_ptr<uint8_t>()))
      symmetric = false;
  });
  TORCH_CHECK(symmetric, "w must lie in [-127, 127], got a -128");
  return panels;
}

Tensor pack_int8_cpu(const Tensor& w) { return fill_panels(w, new_panels(w)); }

// Checks the arguments of int8_rows and returns its result, not filled.
Tensor new_rows(const Tensor& packed, const Tensor& scale, const Tensor& idx, int64_t K) {
  const bool tiled = idx.is_cuda() || packed.scalar_type() == at::kChar;
  TORCH_CHECK(idx.scalar_type() == at::kLong, "idx must be ", at::kLong, ", got ", idx.scalar_type());
  TORCH_CHECK(scale.dim() == 1, "scale must have shape (N), got ", scale.sym_sizes());
  TORCH_CHECK(K > 0, "K must be 1 or more, got ", K);
  const c10::SymInt N = scale.sym_size(0);
  check("packed", packed, tiled ? at::kChar : at::kByte, idx, tiled ? tile_shape<c10::SymInt>(N, K)
                                                                    : panel_shape<c10::SymInt>(N, K), "idx");
  check("scale", scale, at::kFloat, idx, {N}, "idx");
  c10::SymDimVector shape(idx.sym_sizes());
  shape.push_back(K);
  return at::empty_symint(shape, scale.options());
}

// One block for all panels of a model, packed in order of use: the hardware prefetcher runs from one matrix into the
// next, and huge pages save address look-ups. The block lives as long as its last tensor.
class Panels {
 public:
  explicit Panels(const std::vector<std::pair<int64_t, int64_t>>& shapes) {
    int64_t bytes = 0;
    for (const auto& [N, K] : shapes) bytes += c10::multiply_integers(panel_shape(N, K));
    void* memory = huge_alloc(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, memory, "no memory for ", bytes, " bytes");
    rest_ = at::from_blob(memory, {bytes}, std::free, at::kByte);
  }

  // w (N, K) int8 -> panels (ceil(N / 64), ceil(K / 4), 64, 4) uint8, the next piece of the block.
  Tensor pack(const Tensor& w) {
    check_weight(w);
    TORCH_CHECK(w.is_cpu(), "w must be on the CPU, got ", w.device());
    const auto shape = panel_shape(w.size(0), w.size(1));
    const int64_t bytes = c10::multiply_integers(shape);
    TORCH_CHECK(bytes <= rest_.numel(), "w must fit: ", w.sizes(), " takes ", bytes, " bytes, of which ", rest_.numel(),
                " are left");
    const Tensor panels = fill_panels(w, rest_.narrow(0, 0, bytes).view(shape));
    rest_ = rest_.slice(0, bytes);
    return panels;
  }

 private:
  Tensor rest_;
};

// ---- the decoder

struct CpuBackend {
  using Linear = Int8Linear;
  using Packed = uint8_t;
  static constexpr auto kDevice = at::kCPU;
  static constexpr int64_t kAlignment = 1, kHeadDimStep = 2, kMaxHeadDim = kMaxK;
  static at::DimVector packed_shape(int64_t N, int64_t K) { return panel_shape(N, K); }
  static const Tensor& readable(const Tensor& t) { return t; }
};

class CpuDecoder : public CheckedModel<CpuBackend> {
 public:
  using CheckedModel::CheckedModel;
  // keys, values (n_layer, B, n_kv_head, length, head_dim), float, or int8 with scales (n_layer, B, n_kv_head, length)
  using Caches = std::tuple<Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>>;

  // tokens (B, T) int64 -> logits (B, 1, vocab_size) after each sequence's last token.
  Tensor forward(const Tensor& tokens, int64_t pos, const Tensor& keys, const Tensor& values,
                 const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales) {
    const Tensor tokens_ = checked(tokens);
    const int64_t B = tokens.size(0), T = tokens.size(1);
    const Reader reader = this->reader(B, {keys, values, key_scales, value_scales});
    const int64_t room = std::min(reader.length, block_size_) - T;
    TORCH_CHECK(0 <= pos && pos <= room, "pos must be 0 to ", room, ", got ", pos);
    const Tensor logits = at::empty({B, 1, vocab_size_}, tokens.options().dtype(at::kFloat));
    const std::lock_guard<std::mutex> lock(mutex_);
    decoder_.forward({tokens_.const_data_ptr<int64_t>(), B, T, T, pos, reader.keys, reader.values, reader.length,
                      logits.mutable_data_ptr<float>()}, at::get_num_threads());
    return logits;
  }

 private:
  friend class CpuWriter;
  Tensor checked(const Tensor& tokens) const {
    TORCH_CHECK(tokens.scalar_type() == at::kLong && tokens.is_cpu() && tokens.dim() == 2 && tokens.numel() > 0,
                "tokens must be int64 (B, T) on the CPU, got ", tokens.scalar_type(), " ", tokens.sizes());
    const Tensor t = tokens.contiguous();
    check_tokens({t.const_data_ptr<int64_t>(), static_cast<size_t>(t.numel())});
    return t;
  }
  void check_tokens(at::IntArrayRef tokens) const {
    for (const int64_t token : tokens)
      TORCH_CHECK(0 <= token && token < vocab_size_, "token must be 0 to ", vocab_size_ - 1, ", got ", token);
  }
  Reader reader(int64_t B, const Caches& caches) {
    const auto& [keys, values, key_scales, value_scales] = caches;
    TORCH_CHECK(key_scales.has_value() == value_scales.has_value(),
                "key_scales and value_scales must be given both or neither");
    const int64_t length = keys.dim() == 5 ? keys.size(3) : 0;
    return {&decoder_, cache("keys", keys, key_scales, B, length), cache("values", values, value_scales, B, length),
            length};
  }
  Cache cache(const char* name, const Tensor& t, const std::optional<Tensor>& scales, int64_t B, int64_t length) const {
    const int64_t layers = model_.blocks.size(), shape[] = {layers, B, model_.n_kv_head, length, model_.head_dim};
    expect(name, t, scales ? at::kChar : at::kFloat, shape);
    if (!scales) return {t.mutable_data_ptr<float>(), nullptr, nullptr};
    expect(name, *scales, at::kFloat, at::IntArrayRef(shape).slice(0, 4));
    return {nullptr, t.mutable_data_ptr<int8_t>(), scales->mutable_data_ptr<float>()};
  }
  std::mutex mutex_;  // Python's own lock is not held while the decoder works
  Decoder decoder_{model_};
};

class CpuWriter {
 public:
  using Model = std::pair<std::shared_ptr<CpuDecoder>, CpuDecoder::Caches>;
  // prompts (B, T) int64; tokens is (B, T + new_tokens).
  CpuWriter(const Tensor& prompts, int64_t new_tokens, const Model& model, const std::optional<Model>& draft,
            double temperature, int64_t top_k, double top_p, double repetition_penalty, int64_t seed,
            const std::vector<int64_t>& stops, int64_t most_guesses)
      : tokens(start(prompts, new_tokens, model, draft, stops)), end_(prompts.size(1)), model_(model), draft_(draft),
        writer_(reader(model), draft ? std::optional(reader(*draft)) : std::nullopt,
                {static_cast<float>(temperature), top_k, static_cast<float>(top_p),
                 static_cast<float>(repetition_penalty), static_cast<uint64_t>(seed)},
                model.first->vocab_size_, stops, most_guesses, tokens.mutable_data_ptr<int64_t>(), tokens.size(0),
                tokens.size(1)) {}
  // How many tokens each text has then: at least one more, and no more after `seconds`.
  int64_t write(double seconds) {
    std::mutex alone;
    const std::scoped_lock lock(model_.first->mutex_, draft_ ? draft_->first->mutex_ : alone);
    TORCH_CHECK(end_ < tokens.size(1), "all ", tokens.size(1), " tokens are written");
    return end_ = writer_.write(end_, tokens.size(1), seconds, at::get_num_threads());
  }
  const Writer& writer() const { return writer_; }
  const Tensor tokens;

 private:
  static Tensor start(const Tensor& prompts, int64_t new_tokens, const Model& model, const std::optional<Model>& draft,
                      const std::vector<int64_t>& stops) {
    TORCH_CHECK(model.first && new_tokens >= 0, "a decoder is needed, and 0 or more new tokens");
    TORCH_CHECK(!draft || (draft->first && draft->first != model.first &&
                           draft->first->vocab_size_ == model.first->vocab_size_),
                "the draft must be another decoder with as many tokens");
    model.first->check_tokens(stops);
    return at::constant_pad_nd(model.first->checked(prompts), {0, new_tokens});
  }
  Reader reader(const Model& model) const {
    const Reader reader = model.first->reader(tokens.size(0), model.second);
    TORCH_CHECK(reader.length <= model.first->block_size_, "the cache must hold at most ", model.first->block_size_,
                " tokens, got ", reader.length);
    return reader;
  }
  int64_t end_;
  const Model model_;
  const std::optional<Model> draft_;
  Writer writer_;
};

}  // namespace

Tensor pack_tiles(const Tensor& w) {
  check_weight(w);
  const int64_t N = w.size(0), K = w.size(1);
  const auto shape = tile_shape(N, K);
  const Tensor padded = at::constant_pad_nd(w, {0, shape[1] * shape[3] - K, 0, shape[0] * shape[2] - N});
  return padded.view({shape[0], shape[2], shape[1], shape[3]}).transpose(1, 2).contiguous();
}

Tensor int8_rows(const Tensor& packed, const Tensor& scale, const Tensor& idx, int64_t K) {
  Tensor y = new_rows(packed, scale, idx, K);
  const Tensor idx_ = idx.contiguous();
  if (idx.is_cpu())
    for (const int64_t i : at::IntArrayRef(idx_.const_data_ptr<int64_t>(), idx.numel()))
      TORCH_CHECK_INDEX(0 <= i && i < scale.numel(), "idx must be 0 to ", scale.numel() - 1, ", got ", i);
  if (packed.scalar_type() == at::kChar) {
    const Tensor q = packed.index({idx.floor_divide(kTileRows), at::indexing::Slice(), idx.remainder(kTileRows)});
    return at::mul_out(y, q.flatten(-2).narrow(-1, 0, K), scale.index({idx}).unsqueeze(-1));
  }
  const Tensor packed_ = packed.contiguous(), scale_ = scale.contiguous();
  const Int8Linear matrix{scale.numel(), K, packed_.const_data_ptr<uint8_t>(), scale_.const_data_ptr<float>(), nullptr,
                          Activation::none};
  at::parallel_for(0, idx.numel(), 1 + kGrain / K, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      matrix.read_row(idx_.const_data_ptr<int64_t>()[i], y.mutable_data_ptr<float>() + i * K);
  });
  return y;
}

}  // namespace owlet

TORCH_LIBRARY(owlet, m) {
  m.def("int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias=None, "
        "Tensor? residual=None, str activation=\"none\") -> Tensor");
  m.def("pack_int8(Tensor w) -> Tensor");
  m.def("int8_rows(Tensor packed, Tensor scale, Tensor idx, int K) -> Tensor");
}

TORCH_LIBRARY_IMPL(owlet, CPU, m) {
  m.impl("int8_linear", owlet::int8_linear_cpu);
  m.impl("pack_int8", owlet::pack_int8_cpu);
  m.impl("int8_rows", owlet::int8_rows);
}

TORCH_LIBRARY_IMPL(owlet, Meta, m) {
  m.impl("int8_linear", owlet::new_output);
  m.impl("pack_int8", owlet::new_panels);
  m.impl("int8_rows", owlet::new_rows);
}

PYBIND11_MODULE(owlet_kernels, m) {
  namespace py = pybind11;
  using namespace owlet;
  m.doc() = "Registers torch.ops.owlet.int8_linear, pack_int8 and int8_rows.";
  m.def("isa", [] { return kernel().name; }, "The instruction set in use.");
  m.def("variant", [] { return variant().name; }, "How it reads the weights for one token: $OWLET_KERNEL, or the best.");
  m.def("variants", variant_names, "Its ways to do that.");
  m.def("use_variant", use_variant, "Use this one from now on; for tests.");
  m.def("isas", kernel_names, "The instruction sets this CPU supports, best first.");
  m.def("use_isa", use_kernel, "Use this instruction set from now on; for tests.");
  m.def("pack_tiles", pack_tiles, py::arg("w"), "What pack_int8 does on a GPU, on any device.");
  py::class_<Panels>(m, "Panels", "One block of memory for the packed matrices of a model, on huge pages.")
      .def(py::init<const std::vector<std::pair<int64_t, int64_t>>&>(), py::arg("shapes"))
      .def("pack", &Panels::pack, py::arg("w"), "pack_int8 of w (N, K) into the next piece of the block.");
  define_decoder<CpuDecoder>(m, "Decoder", "A whole int8 model, in one parallel region.")
      .def("forward", &CpuDecoder::forward, py::arg("tokens"), py::arg("pos"), py::arg("keys"), py::arg("values"),
           py::arg("key_scales") = py::none(), py::arg("value_scales") = py::none(),
           py::call_guard<py::gil_scoped_release>(),
           "Logits (B, 1, vocab_size) after the last of tokens (B, T) int64; adds them to the caches.");
  py::class_<CpuWriter>(m, "Writer", "Text from a Decoder, with guesses of a draft or of the text itself.")
      .def(py::init<const Tensor&, int64_t, const CpuWriter::Model&, const std::optional<CpuWriter::Model>&, double,
                    int64_t, double, double, int64_t, const std::vector<int64_t>&, int64_t>(),
           py::kw_only(), py::arg("prompts"), py::arg("new_tokens"), py::arg("model"), py::arg("draft"),
           py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("repetition_penalty"), py::arg("seed"),
           py::arg("stops"), py::arg("most_guesses"))
      .def("write", &CpuWriter::write, py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
           "Writes for some seconds, at least one token; returns how many tokens each text has.")
      .def_readonly("tokens", &CpuWriter::tokens)
      .def_property_readonly("ended", [](const CpuWriter& self) { return self.writer().ended(); })
      .def_property_readonly("guessed", [](const CpuWriter& self) { return self.writer().guessed; })
      .def_property_readonly("right", [](const CpuWriter& self) { return self.writer().right; }, "How many guesses were.");
#ifdef OWLET_CUDA
  cuda::define(m);
#endif
}
