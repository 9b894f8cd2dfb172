// fastdg::outer_norms on the CPU.
#include "geometry.h"

namespace fastdg {

Tensor outer_norms(const Tensor& a, const Tensor& delta, Window window) {
  const Outer p = outer_problem(a, delta, window);
  const Routines& isa = routines();
  Tensor norms = allocate(a, {p.samples});
  float* out = floats(norms);
  const int64_t T = p.positions, left = p.left_width(), right = p.right.width;
  // The same |g|^2 by T I O or by T^2 (I + O) products.
  const bool gram = T * (left + right) <= left * right;
  for_each_task(p.samples, [&](int64_t n) {
    out[n] = gram ? std::max(isa.norm_gram(p, n), 0.f) : isa.norm_direct(p, n);
  });
  return norms;
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("outer_norms", TORCH_BOX(&fastdg::outer_norms));
}
