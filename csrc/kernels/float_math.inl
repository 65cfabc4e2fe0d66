// RMSNorm, RoPE and attention: float_math.cpp includes this once for each kind of registers. Before, it defines TARGET,
// Lanes (whose registers are `part`), kRows, kVecs, splat, load, store, fma(a, b, c) = a * b + c of one register, and
// sums_of, the sums of four Lanes.
constexpr int kParts = sizeof(Lanes) / sizeof(Lanes::part[0]);

TARGET inline Lanes operator+(Lanes a, const Lanes& b) {
  for (int i = 0; i < kParts; ++i) a.part[i] += b.part[i];
  return a;
}

TARGET inline Lanes operator-(Lanes a, const Lanes& b) {
  for (int i = 0; i < kParts; ++i) a.part[i] -= b.part[i];
  return a;
}

TARGET inline Lanes operator*(Lanes a, const Lanes& b) {
  for (int i = 0; i < kParts; ++i) a.part[i] *= b.part[i];
  return a;
}

// a + b * c, rounded once.
TARGET inline Lanes add_product(Lanes a, const Lanes& b, const Lanes& c) {
  for (int i = 0; i < kParts; ++i) a.part[i] = fma(b.part[i], c.part[i], a.part[i]);
  return a;
}

// The first `count` values, padded with zeros.
template <typename T>
TARGET inline Lanes load(const T* x, int64_t count) {
  T part[kLanes] = {};
  std::memcpy(part, x, count * sizeof(T));
  return load(part);
}

TARGET inline void store(Lanes x, int64_t count, float* y) {
  float part[kLanes];
  store(x, part);
  std::memcpy(y, part, count * sizeof(float));
}

TARGET inline float sum_of(Lanes x) {
  float lanes[kLanes];
  store(x, lanes);
  return owlet::sum_of(lanes);
}

TARGET void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y) {
  Lanes sum[2] = {splat(0), splat(0)};  // two, so that an addition need not wait for the last
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes)
    for (int v = 0; v < 2; ++v) sum[v] = add_product(sum[v], load(x + i + v * kLanes), load(x + i + v * kLanes));
  for (; i < size; i += kLanes) {
    const Lanes rest = load(x + i, std::min<int64_t>(kLanes, size - i));
    sum[0] = add_product(sum[0], rest, rest);
  }
  const Lanes inverse = splat(1.0f / std::sqrt(sum_of(sum[0] + sum[1]) / static_cast<float>(size) + eps));
  for (i = 0; i + kLanes <= size; i += kLanes) store(load(x + i) * inverse * load(weight + i), y + i);
  if (i < size) store(load(x + i, size - i) * inverse * load(weight + i, size - i), size - i, y + i);
}

// rope for the next kLanes pairs, or for the `count` pairs that are left.
template <typename... Count>
TARGET inline void rope_lanes(float* x, const float* cos, const float* sin, int64_t half, Count... count) {
  const Lanes a = load(x, count...), b = load(x + half, count...), c = load(cos, count...), s = load(sin, count...);
  store(a * c - b * s, count..., x);
  store(b * c + a * s, count..., x + half);
}

TARGET void rope(float* x, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) rope_lanes(x + i, cos + i, sin + i, half);
  if (i < half) rope_lanes(x + i, cos + i, sin + i, half, half - i);
}

TARGET void dequantize(const int8_t* q, const float* scales, int64_t count, int64_t size, float* y) {
  for (int64_t p = 0; p < count; ++p)
    for (int64_t d = 0; d < size; ++d) y[p * size + d] = static_cast<float>(q[p * size + d]) * scales[p];
}

// ---- one query: a lane is a dimension of the head

// The next addresses to prefetch: `left` bytes from `at`, then from `then` on.
struct Ahead {
  const char* at;
  int64_t left;
  const char* then;
};

TARGET inline void prefetch(Ahead& ahead, int64_t bytes) {
  if (ahead.left <= 0) ahead = {ahead.then, std::numeric_limits<int64_t>::max(), nullptr};
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead.at + i);
  ahead.at += bytes, ahead.left -= bytes;
}

// scores[i] = q . keys[i * row] * scale, for 4 keys.
template <typename T>
TARGET inline void dot_keys(const float* q, const T* keys, int64_t row, int64_t size, float scale, float* scores) {
  Lanes sum[4] = {splat(0), splat(0), splat(0), splat(0)};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes)
    for (int i = 0; i < 4; ++i) sum[i] = add_product(sum[i], load(q + d), load(keys + i * row + d));
  if (d < size)
    for (int i = 0; i < 4; ++i) sum[i] = add_product(sum[i], load(q + d, size - d), load(keys + i * row + d, size - d));
  sums_of(sum, scores);
  for (int i = 0; i < 4; ++i) scores[i] *= scale;
}

// y = sum over p of weights[p] * values[p], for Vecs * 16 dimensions.
template <int Vecs, typename T>
TARGET inline void mix_values(const float* weights, const T* values, int64_t count, int64_t size, float* y,
                              Ahead& ahead) {
  Lanes sum[Vecs];
  for (int v = 0; v < Vecs; ++v) sum[v] = splat(0);
  for (int64_t p = 0; p < count; ++p) {
    prefetch(ahead, Vecs * kLanes * sizeof(T));
    const Lanes weight = splat(weights[p]);
    for (int v = 0; v < Vecs; ++v) sum[v] = add_product(sum[v], weight, load(values + p * size + v * kLanes));
  }
  for (int v = 0; v < Vecs; ++v) store(sum[v], y + v * kLanes);
}

template <typename T>
TARGET void attend(const float* q, const T* keys, const float* key_scales, const T* values, const float* value_scales,
                   int64_t count, int64_t size, float* scores, float* y, const void* next) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  const int64_t bytes = count * size * sizeof(T), head_start = std::min(kAhead, bytes);
  const auto* next_keys = reinterpret_cast<const char*>(keys) + head_start;
  const auto* next_values = reinterpret_cast<const char*>(values);
  Ahead ahead{next_keys, bytes - head_start, next_values};
  int64_t p = 0;
  for (; p + 4 <= count; p += 4) {
    prefetch(ahead, 4 * size * sizeof(T));
    dot_keys(q, keys + p * size, size, size, scale, scores + p);
  }
  for (; p < count; ++p) {
    float same[4];
    dot_keys(q, keys + p * size, 0, size, scale, same);
    scores[p] = same[0];
  }
  if (key_scales)
    for (p = 0; p < count; ++p) scores[p] *= key_scales[p];

  // Softmax without the division. The padding of the last lanes has weight e^-87, which adds nothing to the sum. A NaN
  // among the scores makes all weights NaN.
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
  float high[kLanes], highest = scores[0];
  std::copy_n(scores, kLanes, high);
  for (p = kLanes; p < padded; p += kLanes)
    for (int l = 0; l < kLanes; ++l) high[l] = scores[p + l] > high[l] ? scores[p + l] : high[l];
  for (int l = 0; l < kLanes; ++l) highest = high[l] > highest ? high[l] : highest;
  for (p = 0; p < padded; ++p) scores[p] = exp_range(scores[p] - highest);
  for (p = 0; p < padded; p += kWide) wide(scores + p) = exp_approx(wide(scores + p));
  Lanes sum = splat(0);
  for (p = 0; p < padded; p += kLanes) sum = sum + load(scores + p);
  const float inverse = 1.0f / sum_of(sum);
  if (value_scales)
    for (p = 0; p < count; ++p) scores[p] *= value_scales[p];

  ahead = {next_values + head_start, bytes - head_start, static_cast<const char*>(next)};
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes) mix_values<4>(scores, values + d, count, size, y + d, ahead);
  for (; d + kLanes <= size; d += kLanes) mix_values<1>(scores, values + d, count, size, y + d, ahead);
  if (d < size) {
    Lanes rest = splat(0);
    for (p = 0; p < count; ++p) rest = add_product(rest, splat(scores[p]), load(values + p * size + d, size - d));
    store(rest, size - d, y + d);
  }
  for (d = 0; d < size; ++d) y[d] *= inverse;
}

// ---- many queries: a lane is a query

// c[m] += sum over k of a[m * row + k * step] * b[k], for Rows rows m and Vecs * 16 queries. The rows of b and c are
// kQueries wide.
template <int Rows, int Vecs>
TARGET inline void multiply_rows(const float* a, int64_t row, int64_t step, const float* b, int64_t steps, float* c) {
  Lanes sum[Rows][Vecs];
  for (int m = 0; m < Rows; ++m)
    for (int v = 0; v < Vecs; ++v) sum[m][v] = load(c + m * kQueries + v * kLanes);
  for (int64_t k = 0; k < steps; ++k, b += kQueries) {
    Lanes x[Vecs];
    for (int v = 0; v < Vecs; ++v) x[v] = load(b + v * kLanes);
    for (int m = 0; m < Rows; ++m) {
      const Lanes value = splat(a[m * row + k * step]);
      for (int v = 0; v < Vecs; ++v) sum[m][v] = add_product(sum[m][v], value, x[v]);
    }
  }
  for (int m = 0; m < Rows; ++m)
    for (int v = 0; v < Vecs; ++v) store(sum[m][v], c + m * kQueries + v * kLanes);
}

TARGET inline void multiply(const float* a, int64_t rows, int64_t row, int64_t step, const float* b, int64_t steps,
                            float* c) {
  constexpr int64_t kSteps = 128;  // this much of a and b stays in the L1 cache while all rows use it
  std::fill_n(c, rows * kQueries, 0.0f);
  for (; steps > 0; steps -= kSteps, a += kSteps * step, b += kSteps * kQueries) {
    const int64_t some = std::min(kSteps, steps);
    for (int q = 0; q < kQueries; q += kVecs * kLanes) {
      int64_t m = 0;
      for (; m + kRows <= rows; m += kRows)
        multiply_rows<kRows, kVecs>(a + m * row, row, step, b + q, some, c + m * kQueries + q);
      for (; m < rows; ++m) multiply_rows<1, kVecs>(a + m * row, row, step, b + q, some, c + m * kQueries + q);
    }
  }
}

TARGET void attend_block(const float* q, int64_t q_stride, int64_t queries, int64_t pos, const float* keys,
                         const float* values, int64_t size, float* scratch, float* y, int64_t y_stride) {
  const int64_t count = pos + queries;
  float* scores = scratch;                     // (count, kQueries)
  float* columns = scores + count * kQueries;  // (size, kQueries): the queries
  float* results = columns + size * kQueries;  // (size, kQueries)
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  if (queries < kQueries) std::fill_n(columns, size * kQueries, 0.0f);
  for (int64_t l = 0; l < queries; ++l)
    for (int64_t d = 0; d < size; ++d) columns[d * kQueries + l] = q[l * q_stride + d] * scale;
  multiply(keys, count, size, 1, columns, size, scores);

  // Keys past a query's position have weight e^-87, which is nothing beside the highest weight, 1.
  for (int64_t p = pos + 1; p < count; ++p)
    std::fill_n(scores + p * kQueries, p - pos, -std::numeric_limits<float>::infinity());
  float high[kQueries], sum[kQueries] = {};
  std::copy_n(scores, kQueries, high);
  for (int64_t p = 1; p < count; ++p) {
    const float* row = scores + p * kQueries;
    for (int l = 0; l < kQueries; ++l) high[l] = row[l] > high[l] ? row[l] : high[l];
  }
  for (int64_t p = 0; p < count; ++p) {
    float *row = scores + p * kQueries, x[kQueries];
    for (int l = 0; l < kQueries; ++l) x[l] = exp_range(row[l] - high[l]);
    for (int l = 0; l < kQueries; l += kWide) wide(sum + l) += wide(row + l) = exp_approx(wide(x + l));
  }
  multiply(values, size, 1, size, scores, count, results);
  for (int64_t l = 0; l < queries; ++l) {
    const float inverse = 1.0f / sum[l];
    for (int64_t d = 0; d < size; ++d) y[l * y_stride + d] = results[d * kQueries + l] * inverse;
  }
}

constexpr FloatMath math = {rms_norm, rope, dequantize, attend<float>, attend<int8_t>, attend_block};
