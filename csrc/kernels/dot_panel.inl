// The product of a few tokens and a panel. Each instruction set includes this and defines before it:
//   TARGET                   the attribute of its functions, or nothing
//   Register                 a vector of int32, and kRegisters: how many of them a panel's 64 rows fill
//   Weights read(p)          the quads of a Register's rows
//   Inputs spread(quad)      four values of a token, for every row
//   Register splat(int32_t)  the sums before the first product: -128 * q_sum, for weights that are stored as w + 128
//   add(sum, weights, inputs)
//   kAlone, kTogether        how many Registers of sums a pass holds for a single token, and for each of several:
//                            divisors of kRegisters, small enough that all sums stay in registers

template <int Tokens>
TARGET void dot_panel(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int rows,
                      int32_t* acc) {
  constexpr int kStrip = Tokens == 1 ? kAlone : kTogether;
  for (int strip = 0; strip * (kPanelRows / kRegisters) < rows; strip += kStrip) {
    Register sum[Tokens][kStrip];
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < kStrip; ++v) sum[t][v] = splat(-128 * q_sum[t]);
    const uint8_t* w = panel + strip * sizeof(Register);
    for (int64_t i = 0; i < quads; ++i, w += kQuadBytes) {
      Weights weights[kStrip];
      for (int v = 0; v < kStrip; ++v) weights[v] = read(w + v * sizeof(Register));
      for (int t = 0; t < Tokens; ++t) {
        const Inputs inputs = spread(load_quad(q + t * row_bytes(quads) + 4 * i));
        for (int v = 0; v < kStrip; ++v) sum[t][v] = add(sum[t][v], weights[v], inputs);
      }
    }
#pragma GCC unroll 6  // without it, GCC keeps the sums in memory throughout the function
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < kStrip; ++v)
        std::memcpy(acc + t * kPanelRows + (strip + v) * (sizeof(Register) / 4), &sum[t][v], sizeof(Register));
  }
}

constexpr Kernel make_kernel(const char* name, bool (*supported)(), const Variant* one_token = nullptr,
                             size_t variants = 0) {
  return {name, supported, 6,
          {dot_panel<1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>}, one_token, variants};
}
