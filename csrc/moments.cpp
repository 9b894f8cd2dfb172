// fastdg::moments on the CPU.
#include <tuple>

#include "common.h"
#include "routines.h"

namespace fastdg {

namespace {

constexpr int64_t BLOCK_FLOATS = 49152;  // of a domain's rows: read from memory once, from cache twice
constexpr int64_t LEAST_WIDTH = 64, LARGEST_WIDTH = 2048;

Tensor rows_of(const Tensor& grads) {
  check_float(grads, "grads");
  check_cpu(grads, "grads");
  STD_TORCH_CHECK(grads.dim() == 2, "grads: expected [N, P], got ", grads.dim(), " dimensions");
  return grads.size(1) < 2 || grads.stride(1) == 1 ? grads : torch::stable::contiguous(grads);
}

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
  });
}

}  // namespace

std::tuple<Tensor, Tensor> moments(const Tensor& grads, const Tensor& order, const Tensor& offsets) {
  const Tensor rows = rows_of(grads);
  const int64_t P = rows.size(1);
  const Partition partition(order, offsets, rows.size(0));
  const Tensor mean = allocate(grads, {partition.domains(), P});
  const Tensor variance = allocate(grads, {partition.domains(), P});
  for_each_block(partition, P, [&](int64_t d, int64_t column, int64_t width) {
    float *m = floats(mean) + d * P + column, *v = floats(variance) + d * P + column;
    if (partition.count(d) == 0) {
      std::fill_n(m, width, 0.f);
      std::fill_n(v, width, 0.f);
    } else {
      routines().dense_moments(floats(rows) + column, rows.stride(0),
                               {partition.samples(d), partition.count(d)}, width, m, v);
    }
  });
  return {mean, variance};
}

Tensor moments_backward(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& grads,
                        const Tensor& mean, const Tensor& order, const Tensor& offsets) {
  const Tensor rows = rows_of(grads);
  const int64_t N = rows.size(0), P = rows.size(1);
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
    routines().dense_moments_backward(up, floats(rows) + column, rows.stride(0),
                                      {partition.samples(d), partition.count(d)}, width,
                                      floats(out) + column, P);
  });
  return out;
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_FRAGMENT(fastdg_cpp, m) {
  m.def("moments(Tensor grads, Tensor order, Tensor offsets) -> (Tensor, Tensor)");
  m.def("moments_backward(Tensor grad_mean, Tensor grad_variance, Tensor grads, Tensor mean, "
        "Tensor order, Tensor offsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("moments", TORCH_BOX(&fastdg::moments));
  m.impl("moments_backward", TORCH_BOX(&fastdg::moments_backward));
}
