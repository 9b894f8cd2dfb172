// How far feature maps lie from an oracle's. Included once per instruction set, inside its namespace.

// sum_k (a[k] - b[k])^2
static float square_distance(const float* a, const float* b, int64_t size) {
  vec sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * W <= size; k += 4 * W)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const vec gap = load(a + k + v * W) - load(b + k + v * W);
      sums[v] += gap * gap;
    }
  for (; k + W <= size; k += W) {
    const vec gap = load(a + k) - load(b + k);
    sums[0] += gap * gap;
  }
  float sum = add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < size; ++k) sum += (a[k] - b[k]) * (a[k] - b[k]);
  return sum;
}

// to[k] += (a[k] - b[k])^2
static void add_square_distances(float* to, const float* a, const float* b, int64_t size) {
  int64_t k = 0;
  for (; k + W <= size; k += W) {
    const vec gap = load(a + k) - load(b + k);
    store(to + k, load(to + k) + gap * gap);
  }
  for (; k < size; ++k) to[k] += (a[k] - b[k]) * (a[k] - b[k]);
}

static void oracle_squares(const FeatureMaps& x, int64_t sample, float* squares) {
  const float *a = x.features + sample * x.feature_sample, *b = x.oracle + sample * x.oracle_sample;
  if (x.planes) {
    for (int64_t c = 0; c < x.channels; ++c)
      squares[c] = square_distance(a + c * x.feature_step, b + c * x.oracle_step, x.positions);
    return;
  }
  std::fill_n(squares, x.channels, 0.f);
  float part[ORACLE_CHANNELS];  // in the first-level cache; its sums are short, and so exact enough
  for (int64_t c = 0; c < x.channels; c += ORACLE_CHANNELS) {
    const int64_t size = std::min(ORACLE_CHANNELS, x.channels - c);
    for (int64_t begin = 0; begin < x.positions; begin += ORACLE_POSITIONS) {
      std::memset(part, 0, sizeof(float) * size);
      const int64_t end = std::min(begin + ORACLE_POSITIONS, x.positions);
      for (int64_t p = begin; p < end; ++p)
        add_square_distances(part, a + p * x.feature_step + c, b + p * x.oracle_step + c, size);
      for (int64_t k = 0; k < size; ++k) squares[c + k] += part[k];
    }
  }
}

// Of one sample: the gap times its channel's slope, to contiguous memory in the order of the features'.
static void oracle_slopes(const FeatureMaps& x, int64_t sample, const float* slope, float* to) {
  const float *a = x.features + sample * x.feature_sample, *b = x.oracle + sample * x.oracle_sample;
  const int64_t rows = x.planes ? x.channels : x.positions;
  const int64_t size = x.planes ? x.positions : x.channels;
  for (int64_t r = 0; r < rows; ++r, a += x.feature_step, b += x.oracle_step, to += size) {
    const vec same = vec{} + (x.planes ? slope[r] : 0);
    int64_t k = 0;
    for (; k + W <= size; k += W)
      store(to + k, (load(a + k) - load(b + k)) * (x.planes ? same : load(slope + k)));
    for (; k < size; ++k) to[k] = (a[k] - b[k]) * (x.planes ? slope[r] : slope[k]);
  }
}
