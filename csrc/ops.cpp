// The kernels as torch operators, torch.ops.owlet.*, and the decoder for Python: checks and registration. Importing the
// Python module registers them.
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>

#include "huge_pages.h"
#include "writer.h"

namespace owlet {

using at::Tensor;
namespace py = pybind11;

Tensor new_output(const Tensor& x, const Tensor& packed, at::ScalarType dtype, at::IntArrayRef packed_shape,
                  const Tensor& scale, const std::optional<Tensor>& residual, bool swiglu) {
  const auto check = [&](const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) {
    TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
    TORCH_CHECK(t.device() == x.device(), name, " must be on x's device, ", x.device(), ", got ", t.device());
    TORCH_CHECK(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
  };
  const int64_t K = x.size(-1), N = scale.numel();
  TORCH_CHECK(x.scalar_type() == at::kFloat, "x must be ", at::kFloat, ", got ", x.scalar_type());
  TORCH_CHECK(0 < K && K <= kMaxK, "K must be 1 to ", kMaxK, ", for sums to fit int32, got ", K);
  check("weight", packed, dtype, packed_shape);
  check("scale", scale, at::kFloat, {N});
  TORCH_CHECK(!swiglu || N % 2 == 0, "swiglu needs an even N, gate and up in turn, got ", N);
  at::DimVector shape(x.sizes());
  shape.back() = swiglu ? N / 2 : N;
  if (residual) check("residual", *residual, at::kFloat, shape);
  return at::empty(shape, x.options());
}

namespace {

// The multiply-adds that are worth waking a thread (docs/log.md, "Work per thread").
constexpr int64_t kGrain = 1 << 16;

Tensor huge_tensor(int64_t bytes) {
  void* memory = huge_alloc(bytes);
  TORCH_CHECK_WITH(OutOfMemoryError, memory, "cannot allocate memory: ", bytes, " bytes");
  return at::from_blob(memory, {bytes}, std::free, at::kByte);
}

void pack_into(const Tensor& w, uint8_t* packed) {
  const Tensor w_ = w.contiguous();
  const int64_t N = w.size(0), K = w.size(1);
  std::atomic<bool> symmetric = true;
  at::parallel_for(0, ceil_div(N, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    if (!pack_panels(w_.const_data_ptr<int8_t>(), N, K, begin, end, packed)) symmetric = false;
  });
  TORCH_CHECK(symmetric, "w must lie in [-127, 127], got a -128");
}

at::DimVector panel_shape(int64_t N, int64_t K) {
  return {ceil_div(N, kPanelRows), ceil_div(K, 4), kPanelRows, 4};
}

// w (N, K) int8 -> panels, uint8 (ceil(N / 64), ceil(K / 4), 64, 4).
Tensor pack_int8(const Tensor& w) {
  TORCH_CHECK(w.scalar_type() == at::kChar && w.dim() == 2 && w.numel() > 0, "w must be Char (N, K), not empty, got ",
              w.scalar_type(), " ", w.sizes());
  const Tensor panels = huge_tensor(packed_bytes(w.size(0), w.size(1))).view(panel_shape(w.size(0), w.size(1)));
  pack_into(w, panels.mutable_data_ptr<uint8_t>());
  return panels;
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& residual,
                   bool swiglu) {
  TORCH_CHECK(x.dim() >= 1, "x must have shape (..., K), got a scalar");
  const int64_t K = x.size(-1), N = scale.numel();
  const Tensor y = new_output(x, weight, at::kByte, panel_shape(N, K), scale, residual, swiglu);
  if (y.numel() == 0) return y;
  const int64_t tokens = x.numel() / K;
  const Tensor x_ = x.contiguous(), weight_ = weight.contiguous(), scale_ = scale.contiguous();
  const Tensor residual_ = residual ? residual->contiguous() : Tensor();

  QuantizedTokens q(tokens, K);
  at::parallel_for(0, tokens, 1 + kGrain / K, [&](int64_t begin, int64_t end) {
    q.quantize(begin, x_.const_data_ptr<float>() + begin * K, end - begin, K);
  });
  const Int8Linear linear{{N, K, weight_.const_data_ptr<uint8_t>(), scale_.const_data_ptr<float>(),
                           swiglu ? Activation::swiglu : Activation::none}};
  const Choice choice{&kernel()};
  const int64_t tasks = linear.tasks(tokens), task_work = tokens * N * K / tasks;
  at::parallel_for(0, tasks, 1 + kGrain / (1 + task_work), [&](int64_t begin, int64_t end) {
    linear.forward(choice, q, tokens, data_or_null(residual_), begin, end, y.mutable_data_ptr<float>());
  });
  return y;
}

// ---- the decoder

// Adds up the bytes of a model's packed matrices.
struct Measure : CpuLayout {
  static constexpr auto require = TensorSource::require;
  float number(const char*) { return 0; }
  const float* floats(const char*, int64_t, int64_t) { return nullptr; }
  Int8Linear matrix(const char*, int64_t N, int64_t K) { return bytes += packed_bytes(N, K), Int8Linear{}; }
  int64_t bytes = 0;
};

// Packs the matrices, int8 (N, K) row-major, into one block in the order of use: the hardware prefetcher runs from one
// into the next, and huge pages save address look-ups. Copies all else, since a tensor that was read from a file keeps
// the file in memory.
struct CpuSource : TensorSource, CpuLayout {
  using TensorSource::TensorSource;
  DecoderModel model() {
    const Sizes sizes = this->sizes();
    Measure measure;
    read_model(measure, sizes);
    held.push_back(huge_tensor(measure.bytes));
    next_panel = held[0].mutable_data_ptr<uint8_t>();
    DecoderModel model = read_model(*this, sizes);
    end();
    return model;
  }
  const float* floats(const char* name, int64_t rows, int64_t columns) {
    held.push_back(next(name, at::kFloat).clone(at::MemoryFormat::Contiguous));
    TORCH_CHECK(held.back().is_cpu() && held.back().numel() == rows * columns, name, " must be (", rows, ", ", columns,
                ") on the CPU, got ", held.back().sizes(), " on ", held.back().device());
    return held.back().const_data_ptr<float>();
  }
  Int8Linear matrix(const char* name, int64_t N, int64_t K) {
    const Tensor w = next(name, at::kChar);
    TORCH_CHECK(w.is_cpu() && w.sizes() == at::IntArrayRef({N, K}), name, " must be (", N, ", ", K, ") on the CPU, got ",
                w.sizes(), " on ", w.device());
    uint8_t* const packed = next_panel;
    pack_into(w, packed);
    next_panel += packed_bytes(N, K);
    return {{N, K, packed, floats(name, 1, N), Activation::none}};
  }
  uint8_t* next_panel = nullptr;
};

struct PyCache : Cache {
  PyCache(const DecoderModel& model, int64_t batch, int64_t length) : Cache(model, batch, length), of(&model) {}
  const DecoderModel* const of;
  int64_t pos = 0;  // tokens held
};

class PyDecoder {
 public:
  explicit PyDecoder(const py::iterable& arrays) : source_(py::iter(arrays)), decoder_(source_.model()) {}

  // tokens (B, T) int64 -> logits (B, 1, vocab_size) after each sequence's last token; all: (1, T, vocab_size), for one
  // sequence.
  Tensor forward(const Tensor& tokens, PyCache& cache, bool all) {
    const Tensor tokens_ = checked(tokens);
    const int64_t B = tokens.size(0), T = tokens.size(1), room = cache.length - T;
    TORCH_CHECK(cache.of == &decoder_.model, "the cache must be one of this decoder's");
    TORCH_CHECK(B == cache.batch && (B == 1 || !all), "tokens must be ", cache.batch, " rows (one for all), got ", B);
    TORCH_CHECK(0 <= cache.pos && cache.pos <= room, "pos must be 0 to ", room, ", got ", cache.pos);
    const Tensor logits = at::empty({B, all ? T : 1, vocab_size()}, tokens.options().dtype(at::kFloat));
    const std::lock_guard<std::mutex> lock(mutex);
    decoder_.forward({tokens_.const_data_ptr<int64_t>(), B, T, T, cache.pos, &cache, logits.mutable_data_ptr<float>(),
                      all}, at::get_num_threads());
    cache.pos += T;
    return logits;
  }
  PyCache new_cache(int64_t batch, int64_t length) const {
    const int64_t most = decoder_.model.block_size;
    TORCH_CHECK(batch >= 1 && 1 <= length && length <= most, "the cache must hold 1 to ", most, " tokens, got ", length,
                " of ", batch, " sequences");
    return PyCache(decoder_.model, batch, length);
  }
  Tensor checked(const Tensor& tokens) const {
    TORCH_CHECK(tokens.scalar_type() == at::kLong && tokens.is_cpu() && tokens.dim() == 2 && tokens.numel() > 0,
                "tokens must be int64 (B, T) on the CPU, got ", tokens.scalar_type(), " ", tokens.sizes());
    const Tensor t = tokens.contiguous();
    check_tokens({t.const_data_ptr<int64_t>(), static_cast<size_t>(t.numel())});
    return t;
  }
  void check_tokens(at::IntArrayRef tokens) const {
    for (const int64_t token : tokens)
      TORCH_CHECK(0 <= token && token < vocab_size(), "token must be 0 to ", vocab_size() - 1, ", got ", token);
  }
  int64_t vocab_size() const { return decoder_.model.vocab_size; }
  Decoder& decoder() { return decoder_; }
  std::mutex mutex;  // Python's own lock is not held while the decoder works

 private:
  CpuSource source_;  // holds the arrays
  Decoder decoder_;
};

class PyWriter {
 public:
  using Model = std::shared_ptr<PyDecoder>;
  PyWriter(const Tensor& prompts, int64_t new_tokens, const Model& model, const Model& draft, const py::kwargs& how)
      : tokens_(start(prompts, new_tokens, model, draft, how)), end_(prompts.size(1)), model_(model), draft_(draft),
        writer_(cached(model, cache_), draft ? std::optional(cached(draft, draft_cache_)) : std::nullopt,
                {how["temperature"].cast<float>(), how["top_k"].cast<int64_t>(), how["top_p"].cast<double>(),
                 how["repetition_penalty"].cast<float>(), static_cast<uint64_t>(how["seed"].cast<int64_t>())},
                how["stops"].cast<std::vector<int64_t>>(), how["most_guesses"].cast<int64_t>(),
                tokens_.mutable_data_ptr<int64_t>(), tokens_.size(0), tokens_.size(1)) {}
  // New tokens (B, n), n >= 1; no pass starts after `seconds`. None: the model's logits are not finite.
  std::optional<Tensor> write(double seconds) {
    std::mutex alone;
    const std::scoped_lock lock(model_->mutex, draft_ ? draft_->mutex : alone);
    TORCH_CHECK(end_ < tokens_.size(1), "all ", tokens_.size(1), " tokens are written");
    const int64_t end = writer_.write(end_, tokens_.size(1), seconds, at::get_num_threads());
    if (end < 0) return std::nullopt;
    return tokens_.slice(1, std::exchange(end_, end), end).clone();
  }
  bool done() const { return writer_.ended() || end_ == tokens_.size(1); }
  std::pair<int64_t, int64_t> guesses() const { return {writer_.guessed, writer_.right}; }

 private:
  static Tensor start(const Tensor& prompts, int64_t new_tokens, const Model& model, const Model& draft,
                      const py::kwargs& how) {
    TORCH_CHECK(model && new_tokens >= 0, "a decoder is needed, and 0 or more new tokens");
    TORCH_CHECK(!draft || (draft != model && draft->vocab_size() == model->vocab_size()),
                "the draft must be another decoder with as many tokens");
    model->check_tokens(how["stops"].cast<std::vector<int64_t>>());
    return at::constant_pad_nd(model->checked(prompts), {0, new_tokens});
  }
  CachedModel cached(const Model& model, std::optional<Cache>& cache) const {
    Decoder& decoder = model->decoder();
    cache.emplace(decoder.model, tokens_.size(0), std::min(decoder.model.block_size, tokens_.size(1)));
    return {&decoder, &*cache};
  }
  const Tensor tokens_;
  int64_t end_;
  const Model model_, draft_;
  std::optional<Cache> cache_, draft_cache_;
  Writer writer_;
};

}  // namespace
}  // namespace owlet

TORCH_LIBRARY(owlet, m) {
  m.def("int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? residual=None, bool swiglu=False) -> Tensor");
  m.def("pack_int8(Tensor w) -> Tensor");
}

TORCH_LIBRARY_IMPL(owlet, CPU, m) {
  m.impl("int8_linear", owlet::int8_linear);
  m.impl("pack_int8", owlet::pack_int8);
}

PYBIND11_MODULE(owlet_kernels, m) {
  using namespace owlet;
  using py::arg;
  m.doc() = "Registers torch.ops.owlet.int8_linear and pack_int8.";
  m.attr("MAX_K") = kMaxK;
  m.def("isa", [] { return kernel().name; }, "The instruction set that a new decoder uses: $OWLET_ISA, or the best.");
  m.def("isas", kernel_names, "The instruction sets this CPU supports, best first.");
  py::class_<PyCache>(m, "Cache", "Keys and values of a Decoder in int8; pos: how many tokens it holds.")
      .def_readwrite("pos", &PyCache::pos);
  py::class_<PyDecoder, std::shared_ptr<PyDecoder>>(m, "Decoder", "A whole int8 model, in one parallel region.")
      .def(py::init<const py::iterable&>(), arg("arrays"))
      .def_property_readonly("kernel", [](PyDecoder& self) { return self.decoder().kernel(); })
      .def("new_cache", &PyDecoder::new_cache, arg("batch"), arg("length"))
      .def("forward", &PyDecoder::forward, arg("tokens"), arg("cache"), arg("all") = false,
           py::call_guard<py::gil_scoped_release>(),
           "Logits (B, 1, vocab_size) after the last of tokens (B, T) int64, or after all; adds them to the cache.");
  py::class_<PyWriter>(m, "Writer", "Text from a Decoder, with guesses of a draft or of the text itself.")
      .def(py::init<const Tensor&, int64_t, const PyWriter::Model&, const PyWriter::Model&, const py::kwargs&>(),
           arg("prompts"), arg("new_tokens"), arg("model"), arg("draft"), "The rest: the fields of Sampling, stops, "
           "most_guesses.")
      .def("write", &PyWriter::write, arg("seconds"), py::call_guard<py::gil_scoped_release>(),
           "New tokens (B, n), one or more; none where the model's logits are not finite.")
      .def_property_readonly("done", &PyWriter::done)
      .def_property_readonly("guesses", &PyWriter::guesses, "How many there were, and how many were right.");
#ifdef OWLET_CUDA
  cuda::define(m);
#endif
}
