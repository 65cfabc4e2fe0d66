// How weights lie in a GPU's memory: int8 (ceil(N/8), ceil(K/64), 8, 64), zero past N and K. That is in tiles of 8
// output channels x 64 k, each 512 bytes in a row: one load of a warp takes a tile, and hands each lane what the tensor
// cores want of it.
#pragma once

namespace owlet::cuda {

constexpr int kTileRows = 8;
constexpr int kTileK = 64;
constexpr int kTileBytes = kTileRows * kTileK;

}  // namespace owlet::cuda
