// fastdg::loss_sums on the CPU: the samples sorted by domain, and their losses summed.
#include <tuple>

#include "common.h"

namespace fastdg {

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_sums(const Tensor& losses, const Tensor& domains,
                                                     int64_t num_domains) {
  check_float(losses, "losses");
  check_cpu(losses, "losses");
  check_cpu(domains, "domains");
  STD_TORCH_CHECK(losses.dim() == 1, "losses: expected a vector, got ", losses.dim(), " dimensions");
  STD_TORCH_CHECK(domains.scalar_type() == torch::headeronly::ScalarType::Long, "domains: expected int64");
  const int64_t N = losses.size(0), D = num_domains;
  check_sizes(domains, "domains", {N});
  STD_TORCH_CHECK(D > 0 && D <= LARGEST_SIDE && N <= LARGEST_SIDE, "num_domains: expected 1 to ", LARGEST_SIDE,
                  ", got ", D);
  const auto* ids = static_cast<const int64_t*>(domains.const_data_ptr());
  const auto* values = static_cast<const float*>(losses.const_data_ptr());
  const int64_t id_stride = domains.stride(0), value_stride = losses.stride(0);
  const auto vector_of = [&](int64_t size) { return torch::stable::new_empty(domains, {size}); };
  const Tensor order = vector_of(N), offsets = vector_of(D + 1), count = vector_of(D);
  auto* at = static_cast<int64_t*>(order.data_ptr());
  auto* first = static_cast<int64_t*>(offsets.data_ptr());
  auto* counted = static_cast<int64_t*>(count.data_ptr());
  std::fill_n(counted, D, 0);
  std::vector<double> sums(D, 0.);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t d = ids[n * id_stride];
    STD_TORCH_CHECK(d >= 0 && d < D, "domains: expected 0 to ", D - 1, ", got ", d);
    ++counted[d];
    sums[d] += values[n * value_stride];
  }
  std::vector<int64_t> next(D);
  first[0] = 0;
  for (int64_t d = 0; d < D; ++d) {
    next[d] = first[d];
    first[d + 1] = first[d] + counted[d];
  }
  for (int64_t n = 0; n < N; ++n) at[next[ids[n * id_stride]]++] = n;
  const Tensor out = allocate(losses, {D});
  for (int64_t d = 0; d < D; ++d) floats(out)[d] = static_cast<float>(sums[d]);
  return {order, offsets, count, out};
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("loss_sums", TORCH_BOX(&fastdg::loss_sums));
}
