// fastdg::variance_gap on the CPU.
#include <numeric>

#include "common.h"
#include "gap.h"
#include "routines.h"

namespace fastdg {

namespace {

constexpr int64_t COLUMNS = 8192;  // of a task

struct Block {
  size_t tensor;
  Range columns;
};

std::vector<Block> blocks_of(const GapTensors& x) {
  std::vector<Block> blocks;
  for (size_t k = 0; k < x.tensors.size(); ++k)
    for (int64_t c = 0; c < x.tensors[k].size; c += COLUMNS)
      blocks.push_back({k, {c, std::min(c + COLUMNS, x.tensors[k].size)}});
  return blocks;
}

GapDomains domains_of(const GapTensors& x, double history) {
  return {x.present, static_cast<int>(x.domains), static_cast<float>(history)};
}

}  // namespace

Tensor variance_gap(const std::vector<Tensor>& variance, const std::vector<Tensor>& ema,
                    const Tensor& present, double history) {
  const GapTensors x(variance, ema, present);
  const auto blocks = blocks_of(x);
  // One sum per block, added in order: the same result however many threads there are.
  std::vector<double> sums(blocks.size());
  for_each_task(static_cast<int64_t>(blocks.size()), [&](int64_t k) {
    sums[k] = routines().variance_gap(x.tensors[blocks[k].tensor], domains_of(x, history),
                                      blocks[k].columns);
  });
  const Tensor total = allocate(variance[0], {});
  *floats(total) = static_cast<float>(std::accumulate(sums.begin(), sums.end(), 0.0));
  return total;
}

std::vector<Tensor> variance_gap_backward(const Tensor& grad, const std::vector<Tensor>& variance,
                                          const std::vector<Tensor>& ema, const Tensor& present,
                                          double history) {
  GapTensors x(variance, ema, present);
  const std::vector<Tensor> grads = x.make_gradients(variance);
  const auto blocks = blocks_of(x);
  check_float(grad, "grad");
  const float scale = 2 * *floats(grad);
  for_each_task(static_cast<int64_t>(blocks.size()), [&](int64_t k) {
    routines().variance_gap_backward(x.tensors[blocks[k].tensor], domains_of(x, history), scale,
                                     blocks[k].columns);
  });
  return grads;
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_FRAGMENT(fastdg_cpp, m) {
  m.def("variance_gap(Tensor[] variance, Tensor[] ema, Tensor present, float history) -> Tensor");
  m.def("variance_gap_backward(Tensor grad, Tensor[] variance, Tensor[] ema, Tensor present, "
        "float history) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("variance_gap", TORCH_BOX(&fastdg::variance_gap));
  m.impl("variance_gap_backward", TORCH_BOX(&fastdg::variance_gap_backward));
}
