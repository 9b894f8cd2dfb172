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

// Where one sample lies: its cosines with its class's text and, in `around`, with the anchors; then what
// the softmax of these has more than the teacher's, in `apart`. An embedding of length 0 has cosine 0.
struct Place {
  float inverse, cosine, distance;  // 1 / length; with the text; sum of apart^2

  Place(const Texts& x, int64_t n, float* around, float* share, float* apart) : distance(0) {
    const float* s = x.embeddings + n * x.stride;
    const int64_t y = x.labels[n], A = x.count, E = x.width;
    const float length = __builtin_sqrtf(dot(s, s, E));
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
  Carver carver(3 * Carver::padded(x.count));
  float *around = carver.take(x.count), *share = carver.take(x.count), *apart = carver.take(x.count);
  for (int64_t n = samples.begin; n < samples.end; ++n) {
    const Place place(x, n, around, share, apart);
    absolute[n] = 1 - place.cosine;
    relative[n] = place.distance * x.scale;
  }
}

static void text_distance_backward(const Texts& x, const float* of_absolute, const float* of_relative,
                                   Range samples, float* out) {
  const int64_t A = x.count, E = x.width;
  Carver carver(3 * Carver::padded(A));
  float *around = carver.take(A), *share = carver.take(A), *apart = carver.take(A);
  for (int64_t n = samples.begin; n < samples.end; ++n) {
    const Place place(x, n, around, share, apart);
    const float *s = x.embeddings + n * x.stride, *text = x.classes + x.labels[n] * E;
    float* to = out + n * E;
    float mean = 0, along = -of_absolute[n] * place.cosine;
    for (int64_t a = 0; a < A; ++a) mean += share[a] * apart[a];
    for (int64_t a = 0; a < A; ++a) {  // from here on share is the derivative by the cosine
      share[a] *= (apart[a] - mean) * (2 * x.scale * of_relative[n]);
      along += share[a] * around[a];
    }
    // What lies along the embedding does not turn it
    const float turn = -along * place.inverse * place.inverse, down = -of_absolute[n] * place.inverse;
    int64_t k = 0;
    for (; k + W <= E; k += W) store(to + k, load(text + k) * down + load(s + k) * turn);
    for (; k < E; ++k) to[k] = text[k] * down + s[k] * turn;
    for (int64_t a = 0; a < A; ++a)
      add_scaled(to, x.anchors + (x.labels[n] * A + a) * E, share[a] * place.inverse, E);
  }
}
