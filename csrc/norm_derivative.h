// The derivative of a norm's gradients: of weight and bias, and of its input's where `up` comes back to that.
// Included once per instruction set, inside its namespace, after norm.h. Reads each map once from memory, and
// the maps of a group (of a row) once more from cache.
//
// With u = gain delta, v = slope delta, h the normalised input, means over the m entries of a group and
// P(y) = rstd (y - mean(y) - h mean(y h)), the gradient at the input is P(u), and
//   of delta: slope h + shift + gain P(up)
//   of x:     P(v) - rstd^2 (mean(up h) (u - mean(u)) + mean(u h) (up - mean(up))
//                            + h (mean(u up) - mean(u) mean(up) - 3 mean(u h) mean(up h)))
//   of gain:  the sums of delta P(up)

struct NormTotals {  // of a channel; weighted by the gain or the slope, of a group
  float delta, delta_x, up, up_x, delta_up;  // x is centred
};

struct NormGroup {  // what is the same for all entries of a group; NormChannel takes it to the maps
  float rstd, level, tilt, of_up, up_level, up_tilt;

  // v and u: the sums of slope delta (and times x), and of gain delta; those of up stand in u.
  NormGroup(const Norm& p, float scale, float v, float v_x, const NormTotals& u) : NormGroup{scale} {
    if (!p.own) return;
    const float share = 1 / (static_cast<float>(p.channels / p.groups) * static_cast<float>(p.positions));
    const float cube = rstd * rstd * rstd * share;
    up_tilt = cube * u.up_x;
    of_up = cube * u.delta_x;
    tilt = cube * (v_x + u.delta_up - 3 * rstd * rstd * share * u.delta_x * u.up_x);
    if (p.mean.data == nullptr) return;
    up_level = rstd * share * u.up;
    level = rstd * share * v - share * (up_tilt * u.delta + of_up * u.up);
    tilt -= cube * share * u.delta * u.up;
  }

 private:
  explicit NormGroup(float scale) : rstd(scale), level(0), tilt(0), of_up(0), up_level(0), up_tilt(0) {}
};

struct NormChannel {
  float slope, by_up, shift;  // slope: of delta in the gradient of x, and of x in that of delta

  NormChannel(const NormGroup& g, float own_slope, float own_shift, float gain)
      : slope(g.rstd * own_slope - g.up_tilt * gain), by_up(g.rstd * gain), shift(own_shift - g.up_level * gain) {}
};

// A norm of given statistics lacks the terms of factor 0, but 0 * inf is NaN.
static inline float term(float factor, float x) { return factor == 0 ? 0 : factor * x; }

static float gain_sum(const NormGroup& g, const NormTotals& own) {
  return g.rstd * own.delta_up - term(g.up_level, own.delta) - term(g.up_tilt, own.delta_x);
}

template <bool UP>
static NormTotals plane_totals(const float* x, const float* d, const float* up, float mean, int64_t size) {
  if constexpr (!UP) {
    const NormSums sums = plane_sums(x, d, mean, size);
    return {sums.bias, sums.weight, 0, 0, 0};
  }
  const vec centre = vec{} + mean;
  vec sums[5] = {};
  int64_t k = 0;
  for (; k + W <= size; k += W) {
    const vec a = load(x + k) - centre, b = load(d + k), c = load(up + k);
    sums[0] += b;
    sums[1] += b * a;
    sums[2] += c;
    sums[3] += c * a;
    sums[4] += b * c;
  }
  NormTotals total{add_lanes(sums[0]), add_lanes(sums[1]), add_lanes(sums[2]), add_lanes(sums[3]), add_lanes(sums[4])};
  for (; k < size; ++k) {
    const float a = x[k] - mean;
    total.delta += d[k];
    total.delta_x += d[k] * a;
    total.up += up[k];
    total.up_x += up[k] * a;
    total.delta_up += d[k] * up[k];
  }
  return total;
}

template <bool UP>
static void plane_derivative(const float* x, const float* d, const float* up, float mean, NormGroup g,
                             NormChannel c, int64_t size, float* __restrict of_x, float* __restrict of_delta) {
  for (int64_t s = 0; s < size; ++s) {
    const float centred = x[s] - mean;
    of_x[s] = c.slope * d[s] - (UP ? term(g.of_up, up[s]) : 0) - g.level - term(g.tilt, centred);
    of_delta[s] = (UP ? c.by_up * up[s] : 0) + c.slope * centred + c.shift;
  }
}

template <bool UP>
static void planes_derivative(const Norm& p, int64_t n, const NormGradient& y) {
  const int64_t size = p.channels / p.groups, S = p.positions;
  ScratchAllocator allocator(3 * padded(size));
  float *delta = allocator.take(size), *delta_x = allocator.take(size), *delta_up = allocator.take(size);
  for (int64_t t = 0; t < p.rows; ++t)
    for (int64_t group = 0; group < p.groups; ++group) {
      const float mean = p.mean.at(n, t, group, 0);
      const int64_t first = group * size;
      float v = 0, v_x = 0;
      NormTotals u{};
      for (int64_t k = 0; (p.own || UP) && k < size; ++k) {
        const int64_t c = first + k;
        const NormTotals own = plane_totals<UP>(p.x.at(n, t, c), p.delta.at(n, t, c),
                                                UP ? p.up.at(n, t, c) : nullptr, mean, S);
        const float gain = y.gain_at(c);
        v += own.delta * y.slope[c];
        v_x += own.delta_x * y.slope[c];
        u.delta += own.delta * gain;
        u.delta_x += own.delta_x * gain;
        u.up += own.up;
        u.up_x += own.up_x;
        u.delta_up += own.delta_up * gain;
        delta[k] = own.delta, delta_x[k] = own.delta_x, delta_up[k] = own.delta_up;
      }
      const NormGroup g(p, p.rstd_at(n, t, group), v, v_x, u);
      for (int64_t k = 0; k < size; ++k) {
        const int64_t c = first + k, to = (t * p.channels + c) * S;
        if (UP) y.of_gain[c] += gain_sum(g, {delta[k], delta_x[k], 0, 0, delta_up[k]});
        plane_derivative<UP>(p.x.at(n, t, c), p.delta.at(n, t, c), UP ? p.up.at(n, t, c) : nullptr, mean, g,
                             {g, y.slope[c], y.shift[c], y.gain_at(c)}, S, y.of_x + to, y.of_delta + to);
      }
    }
}

template <bool UP>
static void layer_totals(const float* x, const float* d, const float* up, float mean, int64_t size,
                         const float* slope, const float* gain, float& v, float& v_x, NormTotals& u) {
  const vec centre = vec{} + mean;
  vec sums[7] = {};
  int64_t c = 0;
  for (; c + W <= size; c += W) {
    const vec a = load(x + c) - centre, of_slope = load(d + c) * load(slope + c);
    sums[0] += of_slope;
    sums[1] += of_slope * a;
    if constexpr (UP) {
      const vec of_gain = load(d + c) * load(gain + c), b = load(up + c);
      sums[2] += of_gain;
      sums[3] += of_gain * a;
      sums[4] += b;
      sums[5] += b * a;
      sums[6] += of_gain * b;
    }
  }
  v = add_lanes(sums[0]), v_x = add_lanes(sums[1]);
  if constexpr (UP)
    u = {add_lanes(sums[2]), add_lanes(sums[3]), add_lanes(sums[4]), add_lanes(sums[5]), add_lanes(sums[6])};
  for (; c < size; ++c) {
    const float a = x[c] - mean;
    v += d[c] * slope[c];
    v_x += d[c] * slope[c] * a;
    if constexpr (UP) {
      const float of_gain = d[c] * gain[c];
      u.delta += of_gain;
      u.delta_x += of_gain * a;
      u.up += up[c];
      u.up_x += up[c] * a;
      u.delta_up += of_gain * up[c];
    }
  }
}

template <bool UP>
static void layer_row(const float* x, const float* d, const float* up, float mean, NormGroup g, int64_t size,
                      const NormGradient& y, const float* gain, float* __restrict of_x, float* __restrict of_delta,
                      float* __restrict of_gain) {
  const float *slope = y.slope, *shift = y.shift;
  for (int64_t c = 0; c < size; ++c) {
    const float centred = x[c] - mean;
    const float by_delta = g.rstd * slope[c] - (UP ? g.up_tilt * gain[c] : 0);
    of_x[c] = by_delta * d[c] - (UP ? term(g.of_up, up[c]) : 0) - g.level - term(g.tilt, centred);
    float found = g.rstd * slope[c] * centred + shift[c];
    if constexpr (UP) {
      const float pulled = g.rstd * up[c] - g.up_level - term(g.up_tilt, centred);
      found += gain[c] * pulled;
      of_gain[c] += d[c] * pulled;
    }
    of_delta[c] = found;
  }
}

// A layer norm: one group, one position.
template <bool UP>
static void layer_derivative(const Norm& p, int64_t n, const NormGradient& y) {
  const int64_t C = p.channels;
  ScratchAllocator allocator(padded(C));
  float* gain = allocator.take(C);
  for (int64_t c = 0; c < C; ++c) gain[c] = y.gain_at(c);
  for (int64_t t = 0; t < p.rows; ++t) {
    const float mean = p.mean.at(n, t, 0, 0);
    const float *x = p.x.at(n, t, 0), *d = p.delta.at(n, t, 0), *up = UP ? p.up.at(n, t, 0) : nullptr;
    float v = 0, v_x = 0;
    NormTotals u{};
    if (p.own) layer_totals<UP>(x, d, up, mean, C, y.slope, gain, v, v_x, u);
    const NormGroup g(p, p.rstd_at(n, t, 0), v, v_x, u);
    layer_row<UP>(x, d, up, mean, g, C, y, gain, y.of_x + t * C, y.of_delta + t * C, y.of_gain);
  }
}

struct NormRowSums {  // of each channel, as NormTotals
  float *delta, *delta_x, *up, *up_x, *delta_up;
};

static void add_up_row(const float* x, const float* d, const float* up, const float* means, int64_t width,
                       NormRowSums sums) {
  float *__restrict delta = sums.delta, *__restrict delta_x = sums.delta_x, *__restrict of_up = sums.up;
  float *__restrict up_x = sums.up_x, *__restrict delta_up = sums.delta_up;
  for (int64_t c = 0; c < width; ++c) {
    const float a = x[c] - means[c];
    delta[c] += d[c];
    delta_x[c] += d[c] * a;
    of_up[c] += up[c];
    up_x[c] += up[c] * a;
    delta_up[c] += d[c] * up[c];
  }
}

// In parts, as row_sums. Each set of sums is one piece of `size` floats, from its first on.
static void up_sums(const Norm& p, const float* x, const float* d, const float* up, const float* means,
                    NormRowSums sums, NormRowSums part, int64_t size) {
  std::fill_n(sums.delta, size, 0.f);
  for (int64_t begin = 0; begin < p.positions; begin += NORM_POSITIONS) {
    const int64_t end = std::min(begin + NORM_POSITIONS, p.positions);
    std::fill_n(part.delta, size, 0.f);
    for (int64_t s = begin; s < end; ++s)
      add_up_row(x + s * p.x.step, d + s * p.delta.step, up + s * p.up.step, means, p.channels, part);
    for (int64_t k = 0; k < size; ++k) sums.delta[k] += part.delta[k];
  }
}

struct NormCoefficients {  // of each channel
  float *mean, *slope, *by_up, *shift, *of_up, *level, *tilt;
};

template <bool UP>
static void channels_derivative(const float* x, const float* d, const float* up, NormCoefficients k, int64_t width,
                                float* __restrict of_x, float* __restrict of_delta) {
  for (int64_t c = 0; c < width; ++c) {
    const float centred = x[c] - k.mean[c];
    of_x[c] = k.slope[c] * d[c] - (UP ? term(k.of_up[c], up[c]) : 0) - k.level[c] - term(k.tilt[c], centred);
    of_delta[c] = (UP ? k.by_up[c] * up[c] : 0) + k.slope[c] * centred + k.shift[c];
  }
}

template <bool UP>
static void rows_derivative(const Norm& p, int64_t n, const NormGradient& y) {
  const int64_t C = p.channels, size = C / p.groups;
  ScratchAllocator allocator(17 * padded(C));
  const auto take = [&] { return allocator.take(C); };
  const NormRowSums sums{take(), take(), take(), take(), take()}, part{take(), take(), take(), take(), take()};
  const NormCoefficients k{take(), take(), take(), take(), take(), take(), take()};
  float *of_x = y.of_x, *of_delta = y.of_delta;
  for (int64_t t = 0; t < p.rows; ++t) {
    const float *x = p.x.at(n, t, 0), *d = p.delta.at(n, t, 0), *up = UP ? p.up.at(n, t, 0) : nullptr;
    by_channel(p, n, t, {0, C}, k.mean, nullptr);
    if (UP)
      up_sums(p, x, d, up, k.mean, sums, part, 5 * padded(C));
    else if (p.own)
      row_sums(p, x, d, 0, k.mean, C, sums.delta, sums.delta_x, part.delta);
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t first = group * size;
      float v = 0, v_x = 0;
      NormTotals u{};
      for (int64_t c = first; (p.own || UP) && c < first + size; ++c) {
        const float gain = y.gain_at(c);
        v += sums.delta[c] * y.slope[c];
        v_x += sums.delta_x[c] * y.slope[c];
        if (!UP) continue;
        u.delta += sums.delta[c] * gain;
        u.delta_x += sums.delta_x[c] * gain;
        u.up += sums.up[c];
        u.up_x += sums.up_x[c];
        u.delta_up += sums.delta_up[c] * gain;
      }
      const NormGroup g(p, p.rstd_at(n, t, group), v, v_x, u);
      for (int64_t c = first; c < first + size; ++c) {
        const NormChannel own(g, y.slope[c], y.shift[c], y.gain_at(c));
        if (UP) y.of_gain[c] += gain_sum(g, {sums.delta[c], sums.delta_x[c], 0, 0, sums.delta_up[c]});
        k.slope[c] = own.slope, k.by_up[c] = own.by_up, k.shift[c] = own.shift;
        k.of_up[c] = g.of_up, k.level[c] = g.level, k.tilt[c] = g.tilt;
      }
    }
    for (int64_t s = 0; s < p.positions; ++s, of_x += C, of_delta += C)
      channels_derivative<UP>(x + s * p.x.step, d + s * p.delta.step, UP ? up + s * p.up.step : nullptr, k, C, of_x,
                              of_delta);
  }
}

template <bool UP>
static void norm_derivative_of(const Norm& p, int64_t n, const NormGradient& y) {
  if (p.planes)
    planes_derivative<UP>(p, n, y);
  else if (p.groups == 1 && p.positions == 1)
    layer_derivative<UP>(p, n, y);
  else
    rows_derivative<UP>(p, n, y);
}

// To contiguous memory in the order of the input's.
static void norm_derivative(const Norm& p, int64_t n, const NormGradient& y) {
  if (p.up.data == nullptr)
    norm_derivative_of<false>(p, n, y);
  else
    norm_derivative_of<true>(p, n, y);
}
