// fastdg::moments on the CPU.
#include <tuple>

#include "moments.h"

namespace fastdg {

namespace {

constexpr int64_t BLOCK_FLOATS = 49152;  // of a domain's rows: read from memory once, from cache twice
constexpr int64_t LEAST_WIDTH = 64, LARGEST_WIDTH = 2048;

// Runs task(domain, first column, width) over all domains and blocks of columns.
template <class Task>
void for_each_block(const Partition& partition, int64_t columns, const Task& task) {
  const int64_t D = partition.domains();
  int64_t largest = 1;
  for (int64_t d = 0; d < D; ++d) largest = std::max(largest, partition.count(d));
  const int64_t width = std::clamp(BLOCK_FLOATS / largest / 16 * 16, LEAST_WIDTH, LARGEST_WIDTH);
  const int64_t blocks = (columns + width - 1) / width;
  for_each_task(D * blocks, [&](int64_t k) {
    const int64_t column = k % blocks * width;
    task(k / blocks, column, std::min(width, columns - column));
  }, 2 * partition.covered() * columns);
}

DenseRows matrix(const Tensor& grads) {
  check_float(grads, "grads");
  check_cpu(grads, "grads");
  STD_TORCH_CHECK(grads.dim() == 2, "grads: expected [N, P], got ", grads.dim(), " dimensions");
  return dense_rows(grads);
}

}  // namespace

DenseRows dense_rows(const Tensor& grads) {
  check_float(grads, "grads");
  check_cpu(grads, "grads");
  STD_TORCH_CHECK(grads.dim() > 0, "grads: expected [N, *], got no dimensions");
  int64_t columns = 1;
  bool gaps = false;  // between the entries of a sample
  for (int64_t d = grads.dim(); d-- > 1;) {
    const int64_t size = grads.size(d);
    gaps |= size > 1 && grads.stride(d) != columns;
    columns *= size;
  }
  const Tensor kept = gaps ? torch::stable::contiguous(grads) : grads;
  return {kept, floats(kept), kept.size(0), kept.stride(0), columns};
}

void moments_of(const DenseRows& rows, const Partition& partition, float* mean, float* variance) {
  const int64_t P = rows.columns;
  for_each_block(partition, P, [&](int64_t d, int64_t column, int64_t width) {
    float *m = mean + d * P + column, *v = variance == nullptr ? nullptr : variance + d * P + column;
    if (partition.count(d) == 0) {
      std::fill_n(m, width, 0.f);
      if (v != nullptr) std::fill_n(v, width, 0.f);
    } else {
      routines().dense_moments(rows.data + column, rows.stride, {partition.samples(d), partition.count(d)},
                               width, m, v);
    }
  });
}

std::tuple<Tensor, Tensor> moments(const Tensor& grads, const Tensor& order, const Tensor& offsets) {
  const DenseRows rows = matrix(grads);
  const Partition partition(order, offsets, rows.samples);
  const Tensor mean = allocate(grads, {partition.domains(), rows.columns});
  const Tensor variance = allocate(grads, {partition.domains(), rows.columns});
  moments_of(rows, partition, floats(mean), floats(variance));
  return {mean, variance};
}

Tensor moments_backward(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& grads,
                        const Tensor& mean, const Tensor& order, const Tensor& offsets) {
  const DenseRows rows = matrix(grads);
  const int64_t N = rows.samples, P = rows.columns;
  const Partition partition(order, offsets, N);
  const std::vector<int64_t> sizes{partition.domains(), P};
  check_sizes(grad_mean, "grad_mean", sizes);
  check_sizes(grad_variance, "grad_variance", sizes);
  check_sizes(mean, "mean", sizes);
  const bool level = !is_expanded_zero(grad_mean);
  const Tensor gm = level ? dense(grad_mean, "grad_mean") : grad_mean,
               gv = dense(grad_variance, "grad_variance"), m = dense(mean, "mean");
  Tensor out = allocate(grads, {N, P});
  if (partition.covered() < N) torch::stable::zero_(out);
  for_each_block(partition, P, [&](int64_t d, int64_t column, int64_t width) {
    const int64_t at = d * P + column;
    const Upstream up{level ? floats(gm) + at : nullptr, floats(gv) + at, floats(m) + at,
                      partition.count(d)};
    routines().dense_moments_backward(up, rows.data + column, rows.stride,
                                      {partition.samples(d), partition.count(d)}, width,
                                      floats(out) + column, P);
  });
  return out;
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("moments", TORCH_BOX(&fastdg::moments));
  m.impl("moments_backward", TORCH_BOX(&fastdg::moments_backward));
}
