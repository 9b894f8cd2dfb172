// fastdg::foreach_moments on the CPU: small tensors, many in one call.
#include <tuple>

#include "geometry.h"
#include "moments.h"

namespace fastdg {

namespace {

std::vector<int64_t> by_domain(const Tensor& grads, int64_t domains) {
  std::vector<int64_t> sizes(grads.sizes().begin(), grads.sizes().end());
  sizes[0] = domains;
  return sizes;
}

}  // namespace

// Each tensor is one task: there are many, and all of them are small.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> foreach_moments(
    const Tensor& order, const Tensor& offsets, const std::vector<Tensor>& grads, const std::vector<Tensor>& a,
    const std::vector<Tensor>& delta, bool variance) {
  STD_TORCH_CHECK(a.size() == delta.size(), "delta: expected ", a.size(), " tensors as a, got ", delta.size());
  STD_TORCH_CHECK(!grads.empty() || !a.empty(), "grads: expected at least one tensor in grads or a");
  std::vector<DenseRows> dense;
  std::vector<Outer> outer;
  dense.reserve(grads.size());
  outer.reserve(a.size());
  for (const Tensor& x : grads) dense.push_back(dense_rows(x));
  for (size_t k = 0; k < a.size(); ++k) outer.push_back(outer_problem(a[k], delta[k], {}, /*narrow_left=*/true, /*flat=*/true));
  const int64_t samples = dense.empty() ? outer[0].samples : dense[0].samples;
  const Partition partition(order, offsets, samples);
  std::vector<Tensor> means, variances;
  int64_t work = 0;
  const auto add = [&](const Tensor& like, int64_t count, const std::vector<int64_t>& sizes, int64_t own) {
    STD_TORCH_CHECK(count == samples, "grads: expected ", samples, " samples in each tensor, got ", count);
    means.push_back(allocate(like, sizes));
    if (variance) variances.push_back(allocate(like, sizes));
    work = std::min(work + std::min(own, LITTLE_WORK), LITTLE_WORK);
  };
  means.reserve(grads.size() + a.size());
  for (size_t k = 0; k < grads.size(); ++k)
    add(grads[k], dense[k].samples, by_domain(grads[k], partition.domains()), samples * dense[k].columns);
  for (size_t k = 0; k < a.size(); ++k)
    add(a[k], outer[k].samples, moments_shape(outer[k], partition), work_of(outer[k]));
  const int64_t first = static_cast<int64_t>(grads.size());
  for_each_task(static_cast<int64_t>(means.size()), [&](int64_t k) {
    float *m = floats(means[k]), *v = variance ? floats(variances[k]) : nullptr;
    if (k < first)
      moments_of(dense[k], partition, m, v);
    else
      moments_of(outer[k - first], partition, m, v);
  }, work);
  return {std::move(means), std::move(variances)};
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("foreach_moments", TORCH_BOX(&fastdg::foreach_moments));
}
