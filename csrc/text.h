// Distances of embeddings to texts, sample by sample. Included once per instruction set, inside its
// namespace.

static float dot(const float* a, const float* b, int64_t size) {
  vec first{}, second{};
  int64_t k = 0;
  for (; k + 2 * W <= size; k += 2 * W) {
    first += load(a + k) * load(b + k);
    second += load(a + k + W) * load(b + k + W);
  }
  float sum = add_lanes(first + second);
  for (; k < size; ++k) sum += a[k] * b[k];
  return sum;
}

static void add_scaled(float* to, const float* from, float scale, int64_t size) {
  int64_t k = 0;
  for (; k + W <= size; k += W) store(to + k, load(to + k) + scale * load(from + k));
  for (; k < size; ++k) to[k] += scale * from[k];
}

// Distances of one sample: its cosines with its class's text and, in `around`, with the anchors; in `apart`
// the softmax of these minus the teacher's. An embedding of length 0 has cosine 0.
struct SampleDistance {
  float length, inverse, cosine, distance;  // 1 / length; with the text; sum of apart^2

  SampleDistance(const Texts& x, int64_t n, float* around, float* share, float* apart) : distance(0) {
    const float* s = x.embeddings + n * x.stride;
    const int64_t y = x.labels[n], A = x.count, E = x.width;
    length = __builtin_sqrtf(dot(s, s, E));
    inverse = length == 0 ? 0 : 1 / length;
    cosine = dot(s, x.classes + y * E, E) * inverse;
    float total = 0;
    for (int64_t a = 0; a < A; ++a) {
      around[a] = dot(s, x.anchors + (y * A + a) * E, E) * inverse;
      share[a] = __builtin_expf(around[a]);
      total += share[a];
    }
    for (int64_t a = 0; a < A; ++a) {
      share[a] /= total;
      apart[a] = share[a] - x.teacher[y * A + a];
      distance += apart[a] * apart[a];
    }
  }
};

static void text_distance(const Texts& x, Range samples, float* absolute, float* relative) {
  ScratchAllocator allocator(3 * padded(x.count));
  float *around = allocator.take(x.count), *share = allocator.take(x.count), *apart = allocator.take(x.count);
  for (int64_t n = samples.begin; n < samples.end; ++n) {
    const SampleDistance sample(x, n, around, share, apart);
    absolute[n] = 1 - sample.cosine;
    relative[n] = sample.distance * x.scale;
  }
}

static void text_distance_backward(const Texts& x, const float* of_absolute, const float* of_relative,
                                   Range samples, float* out) {
  const int64_t A = x.count, E = x.width;
  ScratchAllocator allocator(3 * padded(A) + padded(E));
  float *around = allocator.take(A), *share = allocator.take(A), *apart = allocator.take(A);
  float* unit = allocator.take(E);
  for (int64_t n = samples.begin; n < samples.end; ++n) {
    const SampleDistance sample(x, n, around, share, apart);
    const float *s = x.embeddings + n * x.stride, *text = x.classes + x.labels[n] * E;
    const float length = sample.length == 0 ? 1 : sample.length;
    float* to = out + n * E;
    float mean = 0;
    for (int64_t a = 0; a < A; ++a) mean += share[a] * apart[a];
    for (int64_t k = 0; k < E; ++k) {
      unit[k] = s[k] / length;
      to[k] = -of_absolute[n] * text[k];
    }
    for (int64_t a = 0; a < A; ++a) {
      const float slope = share[a] * (apart[a] - mean) * (2 * x.scale * of_relative[n]);
      add_scaled(to, x.anchors + (x.labels[n] * A + a) * E, slope, E);
    }
    // The part along the embedding does not turn it. Of the rounded sum: of width 1 nothing is left
    const float along = dot(unit, to, E);
    for (int64_t k = 0; k < E; ++k) to[k] = (to[k] - unit[k] * along) * sample.inverse;
  }
}
