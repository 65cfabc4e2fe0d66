// The kernel on 256-bit registers. A file that includes this defines TARGET and add_products(sum, w, a) = sum + the
// products of 8 quads w with the quad that fills a.

template <int Tokens>
TARGET void dot_panel(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int32_t* acc) {
  // A panel is 8 ymm registers wide. Several tokens take it in strips, to keep the sums in registers.
  constexpr int Vecs = Tokens == 1 ? 8 : 2;
  for (int strip = 0; strip < 8; strip += Vecs) {
    __m256i sum[Tokens][Vecs];
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < Vecs; ++v) sum[t][v] = _mm256_set1_epi32(-128 * q_sum[t]);
    for (int64_t i = 0; i < quads; ++i) {
      const auto* w = reinterpret_cast<const __m256i*>(panel + i * kQuadBytes) + strip;
      for (int t = 0; t < Tokens; ++t) {
        const __m256i a = _mm256_set1_epi32(load_quad(q + t * row_bytes(quads) + 4 * i));
        for (int v = 0; v < Vecs; ++v) sum[t][v] = add_products(sum[t][v], _mm256_loadu_si256(w + v), a);
      }
    }
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < Vecs; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + t * kPanelRows) + strip + v, sum[t][v]);
  }
}
