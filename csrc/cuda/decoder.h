// One token per sequence through an int8 model on CUDA, without torch: the arithmetic of csrc/decoder.h in five
// launches a layer. Nothing waits for the host, and the position is read on the device, so the launches of a call can
// be captured once and replayed at every position.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../decoder_model.h"
#include "int8_linear.h"

namespace owlet::cuda {

using DecoderBlock = DecoderBlockOf<Linear>;
using DecoderModel = DecoderModelOf<Linear>;

constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kHeadDimStep = 16;  // head_dim must be a multiple

struct Step {
  const int64_t* tokens;  // (batch)
  const int64_t* pos;     // (1), the position of all tokens: the caches hold those before it, and this one is added
  int64_t batch;
  float *keys, *values;  // (n_layer, batch, n_kv_head, length, head_dim)
  int64_t length;
  float* logits;  // (batch, vocab_size)
};

struct Workspace {
  float *x, *qkv, *attn_out, *hidden;  // (batch, n_embd), (batch, (n_head + 2 n_kv_head) head_dim), ...
  Scratch scratch;                     // for the widest row
};

cudaError_t decode(const DecoderModel& model, const Step& step, const Workspace& workspace, cudaStream_t stream);

}  // namespace owlet::cuda
