// fastdg::activation_derivative on the CPU.
#include <tuple>

#include "blocks.h"
#include "common.h"
#include "routines.h"

namespace fastdg {

namespace {

constexpr int64_t BLOCK = 1 << 14;  // elements of a task
constexpr int64_t COST = 16;        // multiply-adds of an element

}  // namespace

std::tuple<Tensor, Tensor> activation_derivative(const Tensor& x, const Tensor& delta, const Tensor& up,
                                                 int64_t kind) {
  const std::vector<int64_t> sizes{x.sizes().begin(), x.sizes().end()};
  const Tensor from[] = {dense(x, "x"), dense(delta, "delta"), dense(up, "up")};
  check_sizes(delta, "delta", sizes);
  check_sizes(up, "up", sizes);
  STD_TORCH_CHECK(kind >= 0 && kind < ACTIVATIONS, "kind: expected less than ", ACTIVATIONS, ", got ", kind);
  const Tensor of_x = allocate(x, sizes), of_delta = allocate(x, sizes);
  const int64_t size = x.numel();
  if (size == 0) return {of_x, of_delta};
  const Activation p{floats(from[0]), floats(from[1]), floats(from[2]), floats(of_x), floats(of_delta), kind};
  for_each_task(pieces(size, BLOCK), [&](int64_t task) {
    routines().activation_derivative(p, {task * BLOCK, std::min(size, (task + 1) * BLOCK)});
  }, COST * size);
  return {of_x, of_delta};
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("activation_derivative", TORCH_BOX(&fastdg::activation_derivative));
}
