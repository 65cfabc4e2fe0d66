// The forward pass of an int8 model for one token per sequence on CUDA, without torch: the arithmetic of
// csrc/decoder.h in five launches per layer. Nothing waits for the host, and the device reads the position, so a CUDA
// graph can capture the launches of one call and replay them at every position.
#pragma once

#include <cuda_runtime.h>

#include "../layout.h"
#include "int8_linear.h"

namespace owlet::cuda {

using DecoderBlock = DecoderBlockOf<Linear>;
using DecoderModel = DecoderModelOf<Linear>;

constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kHeadDimStep = 16;  // head_dim must be a multiple

struct Step {
  const int64_t* tokens;  // (batch)
  const int64_t* pos;     // (1), for all tokens: the caches hold the positions before it, and this one is added
  int64_t batch;
  int8_t *keys, *values;             // (n_layer, batch, n_kv_head, length, head_dim)
  float *key_scales, *value_scales;  // (n_layer, batch, n_kv_head, length)
  int64_t length;
  float* logits;  // (batch, vocab_size)
};

struct Workspace {
  float *x, *qkv, *attn_out, *hidden;  // one row per sequence, of n_embd, (n_head + 2 n_kv_head) head_dim, ...
  Scratch scratch;                     // for the widest row
};

cudaError_t decode(const DecoderModel& model, const Step& step, const Workspace& workspace, cudaStream_t stream);

}  // namespace owlet::cuda
