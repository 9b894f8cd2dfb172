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

// With g = slope delta and h the normalised input: g - mean(g) - h mean(g h), times rstd, is the gradient
// of x; as coefficients of delta, 1 and the centred input.
struct NormPull {
  float level, tilt;

  NormPull(const Norm& p, float bias, float weight, float rstd) : level(0), tilt(0) {
    if (!p.own) return;
    const float size = static_cast<float>(p.channels / p.groups) * static_cast<float>(p.positions);
    if (p.mean.data != nullptr) level = rstd * (bias / size);
    tilt = rstd * rstd * rstd * (weight / size);
  }
};

static void pull_plane(const float* x, const float* d, float mean, float scale, float shift, NormPull pull,
                       int64_t size, float* __restrict of_x, float* __restrict of_delta) {
  for (int64_t s = 0; s < size; ++s) {
    const float centred = x[s] - mean;
    of_x[s] = scale * d[s] - pull.level - pull.tilt * centred;
    of_delta[s] = scale * centred + shift;
  }
}

static void planes_gradient(const Norm& p, int64_t n, const float* slope, const float* shift, float* of_x,
                            float* of_delta) {
  const int64_t size = p.channels / p.groups, S = p.positions;
  for (int64_t t = 0; t < p.rows; ++t)
    for (int64_t g = 0; g < p.groups; ++g) {
      const float mean = p.mean.at(n, t, g, 0), rstd = p.rstd_at(n, t, g);
      float bias = 0, weight = 0;
      for (int64_t c = g * size; p.own && c < (g + 1) * size; ++c) {
        const NormSums sums = plane_sums(p.x.at(n, t, c), p.delta.at(n, t, c), mean, S);
        bias += sums.bias * slope[c];
        weight += sums.weight * slope[c];
      }
      const NormPull pull(p, bias, weight, rstd);
      for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        const float *x = p.x.at(n, t, c), *d = p.delta.at(n, t, c);
        const int64_t to = (t * p.channels + c) * S;
        pull_plane(x, d, mean, slope[c] * rstd, shift[c], pull, S, of_x + to, of_delta + to);
      }
    }
}

// One group of all channels: its mean, rstd and pull are numbers.
static void pull_row(const float* x, const float* d, float mean, float rstd, NormPull pull, int64_t width,
                     const float* slope, const float* shift, float* __restrict of_x,
                     float* __restrict of_delta) {
  for (int64_t c = 0; c < width; ++c) {
    const float centred = x[c] - mean, scale = slope[c] * rstd;
    of_x[c] = scale * d[c] - pull.level - pull.tilt * centred;
    of_delta[c] = scale * centred + shift[c];
  }
}

static NormSums dots(const float* bias, const float* weight, const float* slope, int64_t size) {
  vec b = {}, w = {};
  int64_t c = 0;
  for (; c + W <= size; c += W) {
    b += load(bias + c) * load(slope + c);
    w += load(weight + c) * load(slope + c);
  }
  NormSums sums{add_lanes(b), add_lanes(w)};
  for (; c < size; ++c) {
    sums.bias += bias[c] * slope[c];
    sums.weight += weight[c] * slope[c];
  }
  return sums;
}

static void one_group_gradient(const Norm& p, int64_t n, const float* slope, const float* shift,
                               float* of_x, float* of_delta) {
  const int64_t C = p.channels;
  ScratchAllocator allocator(4 * padded(C));
  float *bias = allocator.take(C), *weight = allocator.take(C), *part = allocator.take(2 * padded(C));
  for (int64_t t = 0; t < p.rows; ++t) {
    const float mean = p.mean.at(n, t, 0, 0), rstd = p.rstd_at(n, t, 0);
    const float *x = p.x.at(n, t, 0), *d = p.delta.at(n, t, 0);
    NormSums sums{};
    if (p.own) {
      row_sums(p, x, d, mean, nullptr, C, bias, weight, part);
      sums = dots(bias, weight, slope, C);
    }
    const NormPull pull(p, sums.bias, sums.weight, rstd);
    for (int64_t s = 0; s < p.positions; ++s, of_x += C, of_delta += C)
      pull_row(x + s * p.x.step, d + s * p.delta.step, mean, rstd, pull, C, slope, shift, of_x, of_delta);
  }
}

struct NormCoefficients {  // of each channel
  float *mean, *scale, *level, *tilt;
};

static void pull_channels(const float* x, const float* d, NormCoefficients k, int64_t width,
                          const float* shift, float* __restrict of_x, float* __restrict of_delta) {
  for (int64_t c = 0; c < width; ++c) {
    const float centred = x[c] - k.mean[c];
    of_x[c] = k.scale[c] * d[c] - k.level[c] - k.tilt[c] * centred;
    of_delta[c] = k.scale[c] * centred + shift[c];
  }
}

static void groups_gradient(const Norm& p, int64_t n, const float* slope, const float* shift, float* of_x,
                            float* of_delta) {
  const int64_t C = p.channels, size = C / p.groups;
  ScratchAllocator allocator(8 * padded(C));
  float *bias = allocator.take(C), *weight = allocator.take(C), *part = allocator.take(2 * padded(C));
  const NormCoefficients k{allocator.take(C), allocator.take(C), allocator.take(C), allocator.take(C)};
  for (int64_t t = 0; t < p.rows; ++t) {
    const float *x = p.x.at(n, t, 0), *d = p.delta.at(n, t, 0);
    by_channel(p, n, t, {0, C}, k.mean, nullptr);
    if (p.own) row_sums(p, x, d, 0, k.mean, C, bias, weight, part);
    for (int64_t g = 0; g < p.groups; ++g) {
      const float rstd = p.rstd_at(n, t, g);
      const int64_t at = g * size;
      const NormSums sums = p.own ? dots(bias + at, weight + at, slope + at, size) : NormSums{};
      const NormPull pull(p, sums.bias, sums.weight, rstd);
      for (int64_t c = at; c < at + size; ++c) {
        k.scale[c] = slope[c] * rstd;
        k.level[c] = pull.level;
        k.tilt[c] = pull.tilt;
      }
    }
    for (int64_t s = 0; s < p.positions; ++s, of_x += C, of_delta += C)
      pull_channels(x + s * p.x.step, d + s * p.delta.step, k, C, shift, of_x, of_delta);
  }
}

// To contiguous memory in the order of the input's.
static void norm_gradient(const Norm& p, int64_t n, const float* slope, const float* shift, float* of_x,
                          float* of_delta) {
  if (p.planes)
    planes_gradient(p, n, slope, shift, of_x, of_delta);
  else if (p.groups == 1)
    one_group_gradient(p, n, slope, shift, of_x, of_delta);
  else
    groups_gradient(p, n, slope, shift, of_x, of_delta);
}
