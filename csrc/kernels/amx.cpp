// AMX: tdpbsud multiplies a tile of 16 tokens x 64 k by a tile of 64 k x 16 rows of w. The packed layout holds the
// second tile as it is: 16 quads of 16 rows, 256 bytes apart.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "amx.h"

#define TARGET __attribute__((target("amx-tile,amx-int8")))

namespace owlet {
namespace {

// Up to this many tokens are faster without tiles (docs/log.md, "AMX tiles"), as are K that do not fill them.
constexpr int kVnniTokens = 6;

template <int Tokens>
TARGET void dot_panel(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int rows,
                      int32_t* acc) {
  if (Tokens <= kVnniTokens || quads % kTile) {
    for (int t = 0; t < Tokens; t += kVnniTokens)
      avx512_vnni.dot_panel[std::min(kVnniTokens, Tokens - t) - 1](q + t * row_bytes(quads), q_sum + t, panel, quads,
                                                                   rows, acc + t * kPanelRows);
  } else {
    static constexpr TileConfig config = tile_config(Tokens);
    constexpr bool past = Tokens > kTile;
    constexpr int sum_stride = 4 * kPanelRows;
    const int64_t q_stride = row_bytes(quads);
    for (int t = 0; t < Tokens; ++t)
      for (int n = 0; n < kPanelRows; ++n) acc[t * kPanelRows + n] = -128 * q_sum[t];  // the weights' offset

    asm volatile("" : : : "memory");  // store the sums above: GCC does not know that tile loads read memory
    _tile_loadconfig(&config);
    for (int strip = 0; strip < rows; strip += 2 * kTile) {
      int32_t* sums = acc + strip;
      _tile_loadd(0, sums, sum_stride);
      _tile_loadd(1, sums + kTile, sum_stride);
      if constexpr (past) {
        _tile_loadd(2, sums + kTile * kPanelRows, sum_stride);
        _tile_loadd(3, sums + kTile * kPanelRows + kTile, sum_stride);
      }
      for (int64_t i = 0; i < quads; i += kTile) {
        const uint8_t* w = panel + i * kQuadBytes + 4 * strip;
        _tile_loadd(6, w, kQuadBytes);
        _tile_loadd(4, q + 4 * i, q_stride);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, w + 64, kQuadBytes);
        _tile_dpbsud(1, 4, 7);
        if constexpr (past) {
          _tile_loadd(5, q + kTile * q_stride + 4 * i, q_stride);
          _tile_dpbsud(2, 5, 6);
          _tile_dpbsud(3, 5, 7);
        }
      }
      _tile_stored(0, sums, sum_stride);
      _tile_stored(1, sums + kTile, sum_stride);
      if constexpr (past) {
        _tile_stored(2, sums + kTile * kPanelRows, sum_stride);
        _tile_stored(3, sums + kTile * kPanelRows + kTile, sum_stride);
      }
    }
    _tile_release();
  }
}

// A process must ask Linux for permission before it uses tile registers.
bool supported() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kTileAndInt8 = 3u << 24;  // bits of leaf 7's edx; older compilers have no names for them
  unsigned eax, ebx, ecx, edx;
  return avx512_vnni.supported() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
         (edx & kTileAndInt8) == kTileAndInt8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

template <int... Tokens>
constexpr Kernel with_tiles(std::integer_sequence<int, Tokens...>) {
  return {"amx", supported, kMaxTileTokens, {dot_panel<Tokens + 1>...}, avx512_one_token, std::size(avx512_one_token)};
}

}  // namespace

const Kernel amx = with_tiles(std::make_integer_sequence<int, kMaxTileTokens>());

}  // namespace owlet
#endif
