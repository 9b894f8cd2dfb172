// Gradients of a norm's weight and bias. Included once per instruction set, inside its namespace.
// Bound by memory: the forward reads the input and delta once, and the derivative once more from cache.

struct NormSums {  // of delta, and of delta times the centred input
  float bias, weight;
};

static NormSums plane_sums(const float* x, const float* delta, float mean, int64_t size) {
  const vec centre = vec{} + mean;
  vec bias[2] = {}, weight[2] = {};
  int64_t k = 0;
  for (; k + 2 * W <= size; k += 2 * W)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const vec d = load(delta + k + v * W);
      bias[v] += d;
      weight[v] += d * (load(x + k + v * W) - centre);
    }
  NormSums sums{add_lanes(bias[0] + bias[1]), add_lanes(weight[0] + weight[1])};
  for (; k < size; ++k) {
    sums.bias += delta[k];
    sums.weight += delta[k] * (x[k] - mean);
  }
  return sums;
}

// For `width` channels, with one mean for all channels or one for each; adds to both outputs.
static void add_row(const float* x, const float* delta, float mean, const float* means, int64_t width,
                    float* __restrict bias, float* __restrict weight) {
  if (means == nullptr) {
    for (int64_t c = 0; c < width; ++c) {
      bias[c] += delta[c];
      weight[c] += delta[c] * (x[c] - mean);
    }
  } else {
    for (int64_t c = 0; c < width; ++c) {
      bias[c] += delta[c];
      weight[c] += delta[c] * (x[c] - means[c]);
    }
  }
}

static void add_layer_row(const float* x, const float* delta, float mean, float rstd, int64_t width,
                          float* __restrict bias, float* __restrict weight) {
  for (int64_t c = 0; c < width; ++c) {
    bias[c] += delta[c];
    weight[c] += delta[c] * ((x[c] - mean) * rstd);
  }
}

// Sums over all positions of one row, in parts, which are short and so exact enough; `part` has room for two
// padded rows.
static void row_sums(const Norm& p, const float* x, const float* delta, float mean, const float* means,
                     int64_t width, float* bias, float* weight, float* part) {
  float *b = part, *w = part + padded(width);
  std::fill_n(bias, width, 0.f);
  std::fill_n(weight, width, 0.f);
  for (int64_t begin = 0; begin < p.positions; begin += NORM_POSITIONS) {
    const int64_t end = std::min(begin + NORM_POSITIONS, p.positions);
    std::fill_n(b, width, 0.f);
    std::fill_n(w, width, 0.f);
    for (int64_t s = begin; s < end; ++s)
      add_row(x + s * p.x.step, delta + s * p.delta.step, mean, means, width, b, w);
    for (int64_t c = 0; c < width; ++c) {
      bias[c] += b[c];
      weight[c] += w[c];
    }
  }
}

// The mean of each channel in the range, and its rstd unless null.
static void by_channel(const Norm& p, int64_t n, int64_t t, Range channels, float* mean, float* rstd) {
  const int64_t size = p.channels / p.groups;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    mean[c - channels.begin] = p.mean.at(n, t, c / size, 0);
    if (rstd != nullptr) rstd[c - channels.begin] = p.rstd_at(n, t, c / size);
  }
}

static void norm_sums(const Norm& p, int64_t n, Range channels, float* weight, float* bias) {
  const int64_t width = channels.end - channels.begin, size = p.channels / p.groups;
  std::fill_n(weight, width, 0.f);
  std::fill_n(bias, width, 0.f);
  if (p.planes) {
    for (int64_t t = 0; t < p.rows; ++t)
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const NormSums sums = plane_sums(p.x.at(n, t, c), p.delta.at(n, t, c),
                                         p.mean.at(n, t, c / size, 0), p.positions);
        weight[c - channels.begin] += sums.weight * p.rstd_at(n, t, c / size);
        bias[c - channels.begin] += sums.bias;
      }
    return;
  }
  ScratchAllocator allocator(6 * padded(width));
  float *own_bias = allocator.take(width), *own_weight = allocator.take(width);
  float *means = allocator.take(width), *rstds = allocator.take(width);
  float* part = allocator.take(2 * padded(width));
  for (int64_t t = 0; t < p.rows; ++t) {
    const float *x = p.x.at(n, t, 0) + channels.begin, *d = p.delta.at(n, t, 0) + channels.begin;
    const bool one = p.groups == 1;
    if (!one) by_channel(p, n, t, channels, means, rstds);
    const float mean = p.mean.at(n, t, 0, 0), rstd = p.rstd_at(n, t, 0);
    if (one && p.positions == 1) {  // a layer norm
      add_layer_row(x, d, mean, rstd, width, bias, weight);
      continue;
    }
    row_sums(p, x, d, mean, one ? nullptr : means, width, own_bias, own_weight, part);
    for (int64_t c = 0; c < width; ++c) {
      bias[c] += own_bias[c];
      weight[c] += own_weight[c] * (one ? rstd : rstds[c]);
    }
  }
}
