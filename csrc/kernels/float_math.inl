// Included by float_math.cpp once for each kind of registers, which has defined TARGET, kRows, Lanes
// and: splat, load, store, add, add_product(a, b, c) = a + b * c, rounded once.

// The first `count` of a load, and zeros.
TARGET inline Lanes load(const float* x, int64_t count) {
  float part[kLanes] = {};
  std::memcpy(part, x, count * sizeof(float));
  return load(part);
}

TARGET inline float sum_of(Lanes x) {
  float sum[kLanes];
  store(x, sum);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

TARGET void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y) {
  Lanes sum[2] = {splat(0), splat(0)};  // two, since one would wait for itself
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes)
    for (int v = 0; v < 2; ++v) sum[v] = add_product(sum[v], load(x + i + v * kLanes), load(x + i + v * kLanes));
  for (; i < size; i += kLanes) {
    const Lanes rest = load(x + i, std::min<int64_t>(kLanes, size - i));
    sum[0] = add_product(sum[0], rest, rest);
  }
  const float inverse = 1.0f / std::sqrt(sum_of(add(sum[0], sum[1])) / static_cast<float>(size) + eps);
  for (i = 0; i < size; ++i) y[i] = x[i] * inverse * weight[i];
}

TARGET void rope(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

TARGET void dequantize(const int8_t* q, const float* scales, int64_t count, int64_t size, float* y) {
  for (int64_t p = 0; p < count; ++p)
    for (int64_t d = 0; d < size; ++d) y[p * size + d] = static_cast<float>(q[p * size + d]) * scales[p];
}

// ---- one query: a lane is a place along the head

// scores[i] = q . keys[i] * scale, for Rows keys.
template <int Rows>
TARGET inline void dot_keys(const float* q, const float* keys, int64_t size, float scale, float* scores) {
  Lanes sum[Rows];
  for (int i = 0; i < Rows; ++i) sum[i] = splat(0);
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes)
    for (int i = 0; i < Rows; ++i) {
      __builtin_prefetch(keys + i * size + d + kAhead);
      sum[i] = add_product(sum[i], load(q + d), load(keys + i * size + d));
    }
  if (d < size)
    for (int i = 0; i < Rows; ++i)
      sum[i] = add_product(sum[i], load(q + d, size - d), load(keys + i * size + d, size - d));
  for (int i = 0; i < Rows; ++i) scores[i] = sum_of(sum[i]) * scale;
}

// y = sum over p of weights[p] * values[p], for Vecs * 16 places.
template <int Vecs>
TARGET inline void mix_values(const float* weights, const float* values, int64_t count, int64_t size, float* y) {
  Lanes sum[Vecs];
  for (int v = 0; v < Vecs; ++v) sum[v] = splat(0);
  for (int64_t p = 0; p < count; ++p) {
    const Lanes weight = splat(weights[p]);
    for (int v = 0; v < Vecs; ++v) {
      __builtin_prefetch(values + p * size + v * kLanes + kAhead);
      sum[v] = add_product(sum[v], weight, load(values + p * size + v * kLanes));
    }
  }
  for (int v = 0; v < Vecs; ++v) store(sum[v], y + v * kLanes);
}

TARGET void attend(const float* q, const float* keys, const float* values, int64_t count, int64_t size, float* scores,
                   float* y) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  int64_t p = 0;
  for (; p + kRows <= count; p += kRows) dot_keys<kRows>(q, keys + p * size, size, scale, scores + p);
  for (; p < count; ++p) dot_keys<1>(q, keys + p * size, size, scale, scores + p);

  // Softmax but for the division; what fills the last lanes weighs nothing. A NaN makes all NaN.
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
  float high[kLanes], highest = scores[0];
  std::copy_n(scores, kLanes, high);
  for (p = kLanes; p < padded; p += kLanes)
    for (int l = 0; l < kLanes; ++l) high[l] = scores[p + l] > high[l] ? scores[p + l] : high[l];
  for (int l = 0; l < kLanes; ++l) highest = high[l] > highest ? high[l] : highest;
  for (p = 0; p < padded; ++p) scores[p] = exp_range(scores[p] - highest);
  for (p = 0; p < padded; ++p) scores[p] = exp_approx(scores[p]);
  Lanes sum = splat(0);
  for (p = 0; p < padded; p += kLanes) sum = add(sum, load(scores + p));
  const float inverse = 1.0f / sum_of(sum);

  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes) mix_values<4>(scores, values + d, count, size, y + d);
  for (; d + kLanes <= size; d += kLanes) mix_values<1>(scores, values + d, count, size, y + d);
  if (d < size) {
    Lanes rest = splat(0);
    for (p = 0; p < count; ++p) rest = add_product(rest, splat(scores[p]), load(values + p * size + d, size - d));
    float part[kLanes];
    store(rest, part);
    std::copy_n(part, size - d, y + d);
  }
  for (d = 0; d < size; ++d) y[d] *= inverse;
}

// ---- many queries: a lane is a query

// c[m] = sum over k of a[m * row + k * step] * b[k], for Rows rows m; b (steps, kQueries).
template <int Rows>
TARGET inline void multiply_rows(const float* a, int64_t row, int64_t step, const float* b, int64_t steps, float* c) {
  Lanes sum[Rows];
  for (int m = 0; m < Rows; ++m) sum[m] = splat(0);
  for (int64_t k = 0; k < steps; ++k) {
    const Lanes x = load(b + k * kLanes);
    for (int m = 0; m < Rows; ++m) sum[m] = add_product(sum[m], splat(a[m * row + k * step]), x);
  }
  for (int m = 0; m < Rows; ++m) store(sum[m], c + m * kLanes);
}

TARGET inline void multiply(const float* a, int64_t rows, int64_t row, int64_t step, const float* b, int64_t steps,
                            float* c) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) multiply_rows<kRows>(a + m * row, row, step, b, steps, c + m * kLanes);
  for (; m < rows; ++m) multiply_rows<1>(a + m * row, row, step, b, steps, c + m * kLanes);
}

TARGET void attend_block(const float* q, int64_t q_stride, int64_t queries, int64_t pos, const float* keys,
                         const float* values, int64_t size, float* scratch, float* y, int64_t y_stride) {
  const int64_t count = pos + queries;
  float *scores = scratch;                    // (count, kQueries)
  float *columns = scores + count * kLanes;   // (size, kQueries): the queries
  float *results = columns + size * kLanes;   // (size, kQueries)

  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  for (int64_t d = 0; d < size; ++d)
    for (int l = 0; l < kLanes; ++l) columns[d * kLanes + l] = l < queries ? q[l * q_stride + d] * scale : 0.0f;
  multiply(keys, count, size, 1, columns, size, scores);

  // Keys past a query's position weigh nothing.
  for (int64_t p = pos + 1; p < count; ++p)
    std::fill_n(scores + p * kLanes, p - pos, -std::numeric_limits<float>::infinity());
  float high[kLanes], sum[kLanes] = {};
  std::copy_n(scores, kLanes, high);
  for (int64_t p = 1; p < count; ++p)
    for (int l = 0; l < kLanes; ++l) high[l] = scores[p * kLanes + l] > high[l] ? scores[p * kLanes + l] : high[l];
  for (int64_t p = 0; p < count; ++p)
    for (int l = 0; l < kLanes; ++l) scores[p * kLanes + l] = exp_range(scores[p * kLanes + l] - high[l]);
  for (int64_t i = 0; i < count * kLanes; ++i) scores[i] = exp_approx(scores[i]);
  for (int64_t p = 0; p < count; ++p)
    for (int l = 0; l < kLanes; ++l) sum[l] += scores[p * kLanes + l];

  multiply(values, size, 1, size, scores, count, results);
  for (int64_t l = 0; l < queries; ++l) {
    const float inverse = 1.0f / sum[l];
    for (int64_t d = 0; d < size; ++d) y[l * y_stride + d] = results[d * kLanes + l] * inverse;
  }
}

constexpr FloatMath math = {rms_norm, rope, dequantize, attend, attend_block};
