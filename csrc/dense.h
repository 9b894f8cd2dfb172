// Moments of given per-sample gradients, and their derivative. Bound by memory. Included once per
// instruction set, inside its namespace.

// Mean and, unless null, variance by two passes over a block that stays in cache: it neither cancels nor turns
// negative.
static void dense_moments(const float* grads, int64_t stride, Group group, int64_t width, float* mean,
                          float* variance) {
  const float n = static_cast<float>(group.count);
  const auto rows = [&](auto&& add) {
    for (int64_t s = 0; s < group.count; ++s) {
      const float* row = grads + group.samples[s] * stride;
      for (int64_t k = 0; k < width; ++k) add(k, row[k]);
    }
  };
  std::fill_n(mean, width, 0.f);
  rows([&](int64_t k, float x) { mean[k] += x; });
  for (int64_t k = 0; k < width; ++k) mean[k] /= n;
  if (variance == nullptr) return;
  std::fill_n(variance, width, 0.f);
  rows([&](int64_t k, float x) {
    const float centred = x - mean[k];
    variance[k] += centred * centred;
  });
  for (int64_t k = 0; k < width; ++k) variance[k] /= n;
}

// (2 (g - mean) grad_variance + grad_mean) / n
static void dense_moments_backward(const Upstream& up, const float* grads, int64_t stride,
                                   Group group, int64_t width, float* out, int64_t out_stride) {
  const float n = static_cast<float>(up.count);
  ScratchAllocator allocator(2 * padded(width));
  float *slope = allocator.take(width), *level = allocator.take(width);
  for (int64_t k = 0; k < width; ++k) {
    slope[k] = up.grad_variance[k] * (2 / n);
    level[k] = up.grad_mean == nullptr ? 0 : up.grad_mean[k] / n;
  }
  for (int64_t s = 0; s < group.count; ++s) {
    const float* row = grads + group.samples[s] * stride;
    float* to = out + group.samples[s] * out_stride;
    for (int64_t k = 0; k < width; ++k) to[k] = (row[k] - up.mean[k]) * slope[k] + level[k];
  }
}
