#include "geometry.h"

namespace fastdg {

namespace {

// All sums of one multiple of each step, the last step running fastest.
std::vector<int64_t> grid(const std::vector<int64_t>& counts, const std::vector<int64_t>& steps) {
  std::vector<int64_t> points{0};
  for (size_t k = 0; k < counts.size(); ++k) {
    std::vector<int64_t> finer;
    finer.reserve(points.size() * static_cast<size_t>(counts[k]));
    for (int64_t point : points)
      for (int64_t c = 0; c < counts[k]; ++c) finer.push_back(point + c * steps[k]);
    points = std::move(finer);
  }
  return points;
}

Left patches(const Tensor& a, const Window& window) {
  const size_t dims = window.size() / 3;
  STD_TORCH_CHECK(window.size() == 3 * dims && a.dim() == static_cast<int64_t>(dims) + 2,
                  "window: expected 3 entries for each of ", a.dim() - 2, " dimensions, got ",
                  window.size());
  std::vector<int64_t> outputs, output_steps, taps{a.size(1)}, tap_steps{a.stride(1)};
  for (size_t k = 0; k < dims; ++k) {
    const int64_t kernel = window[k], stride = window[dims + k], dilation = window[2 * dims + k];
    const int64_t dim = static_cast<int64_t>(k) + 2, reach = dilation * (kernel - 1);
    STD_TORCH_CHECK(kernel > 0 && stride > 0 && dilation > 0 && a.size(dim) > reach,
                    "window: does not fit a of size ", a.size(dim));
    outputs.push_back((a.size(dim) - reach - 1) / stride + 1);
    output_steps.push_back(a.stride(dim) * stride);
    taps.push_back(kernel);
    tap_steps.push_back(a.stride(dim) * dilation);
  }
  return {floats(a), a.stride(0), grid(outputs, output_steps), grid(taps, tap_steps)};
}

Left rows(const Tensor& x) {
  return {floats(x), x.stride(0), grid({x.size(1)}, {x.stride(1)}), grid({x.size(2)}, {x.stride(2)})};
}

Right lanes(const Tensor& x) {
  return {floats(x), x.stride(0), x.stride(1), x.stride(2), x.size(2)};
}

int64_t idle_lanes(int64_t width) {
  const int64_t half = routines().panel / 2;
  return (width + half - 1) / half * half - width;
}

}  // namespace

Outer outer_problem(const Tensor& a, const Tensor& delta, const Window& window) {
  check_float(a, "a");
  check_float(delta, "delta");
  STD_TORCH_CHECK(delta.dim() == 3, "delta: expected [N, T, O], got ", delta.dim(), " dimensions");
  STD_TORCH_CHECK(!window.empty() || a.dim() == 3, "a: expected [N, T, I], got ", a.dim(),
                  " dimensions");
  Outer p{};
  p.samples = delta.size(0);
  p.positions = delta.size(1);
  const int64_t O = delta.size(2);
  int64_t I = window.empty() ? a.size(2) : 0;
  // T = 1 writes rows of the output directly, which wants the lanes along I.
  const bool on_delta = !window.empty() || (p.positions != 1 && idle_lanes(O) * I <= idle_lanes(I) * O);
  p.left = !window.empty() ? patches(a, window) : on_delta ? rows(a) : rows(delta);
  p.right = on_delta ? lanes(delta) : lanes(a);
  if (!window.empty()) I = p.left_width();
  p.delta_right = on_delta;
  p.out_left = on_delta ? 1 : I;
  p.out_right = on_delta ? I : 1;
  p.out_size = O * I;
  const int64_t positions = window.empty() ? a.size(1) : static_cast<int64_t>(p.left.row.size());
  STD_TORCH_CHECK(a.size(0) == p.samples, "a: expected ", p.samples, " samples, got ", a.size(0));
  STD_TORCH_CHECK(positions == p.positions, "delta: expected ", positions, " positions, got ",
                  p.positions);
  return p;
}

Gradient gradient_of(const Outer& p, const Tensor& grad_a, const Tensor& grad_delta,
                     const Window& window) {
  const Tensor& to = p.delta_right ? grad_a : grad_delta;
  const Left left = window.empty() ? rows(to) : patches(to, window);
  return {left.data, left.sample, left.row, left.col, !window.empty(),
          floats(p.delta_right ? grad_delta : grad_a)};
}

}  // namespace fastdg
