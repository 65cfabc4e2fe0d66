// How AMX's tile registers are configured.
#pragma once

#include "kernels.h"

namespace owlet {

constexpr int kTile = 16;  // tokens, quads or rows of w

// The operand of ldtilecfg. Keep it in static memory: GCC 12 assumes that the instruction reads only its first 8 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights. Tiles 2, 3 and 5 are for the tokens past 16.
constexpr TileConfig tile_config(int tokens) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool past = tile == 2 || tile == 3 || tile == 5;
    const int own = past ? tokens - kTile : tokens < kTile ? tokens : kTile;
    config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? kTile : own > 0 ? own : 0);
    config.row_bytes[tile] = config.rows[tile] ? 64 : 0;
  }
  return config;
}

}  // namespace owlet
