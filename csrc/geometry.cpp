#include "geometry.h"

#include "blocks.h"

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

// The product of the sizes has to stay below the limit, too.
int64_t side(const std::vector<int64_t>& sizes, const char* name) {
  int64_t product = 1;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size <= LARGEST_SIDE && (product *= size) <= LARGEST_SIDE, name, ": has more than ",
                    LARGEST_SIDE, " positions, inputs or outputs");
  }
  return product;
}

// From one of `count` elements to the next; of fewer than two no stride says anything.
int64_t step(const Tensor& x, int64_t dim, int64_t count, int64_t factor) {
  return count < 2 || x.numel() == 0 ? 0 : x.stride(dim) * factor;
}

// From one sample to the next: of a gradient, which is contiguous, that is a sample's size too.
int64_t sample_step(const Tensor& x) { return x.numel() == 0 ? 0 : x.stride(0); }

// A window as [outputs, kernel, stride, dilation] of each spatial dimension, checked without overflow.
struct Patches {
  std::vector<int64_t> outputs, kernel, stride, dilation;

  Patches(const Tensor& a, const Window& window) {
    const size_t dims = window.size() / 3;
    STD_TORCH_CHECK(window.size() == 3 * dims && a.dim() == static_cast<int64_t>(dims) + 2,
                    "window: expected 3 entries for each of ", a.dim() - 2, " dimensions, got ",
                    window.size());
    for (size_t k = 0; k < dims; ++k) {
      const int64_t size = a.size(static_cast<int64_t>(k) + 2);
      kernel.push_back(window[k]);
      stride.push_back(window[dims + k]);
      dilation.push_back(window[2 * dims + k]);
      STD_TORCH_CHECK(size > 0 && kernel[k] > 0 && stride[k] > 0 && dilation[k] > 0 &&
                          kernel[k] - 1 <= (size - 1) / dilation[k],
                      "window: does not fit a of size ", size);
      outputs.push_back((size - 1 - dilation[k] * (kernel[k] - 1)) / stride[k] + 1);
    }
  }
};

Left patches(const Tensor& a, const Window& window) {
  const Patches p(a, window);
  std::vector<int64_t> output_steps, taps{a.size(1)}, tap_steps{step(a, 1, a.size(1), 1)};
  for (size_t k = 0; k < p.kernel.size(); ++k) {
    const int64_t dim = static_cast<int64_t>(k) + 2;
    output_steps.push_back(step(a, dim, p.outputs[k], p.stride[k]));
    taps.push_back(p.kernel[k]);
    tap_steps.push_back(step(a, dim, p.kernel[k], p.dilation[k]));
  }
  return {floats(a), sample_step(a), grid(p.outputs, output_steps), grid(taps, tap_steps)};
}

// Rows [N, T, C], or [N, C] where each sample has one.
int64_t positions_of(const Tensor& x) { return x.dim() == 2 ? 1 : x.size(1); }

Left rows(const Tensor& x) {
  const int64_t T = positions_of(x), last = x.dim() - 1, C = x.size(last);
  return {floats(x), sample_step(x), grid({T}, {step(x, 1, T, 1)}), grid({C}, {step(x, last, C, 1)})};
}

Right lanes(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return {floats(x), x.stride(0), last == 1 ? 0 : x.stride(1), x.stride(last), x.size(last)};
}

bool is_rows(const Tensor& x, bool flat) { return x.dim() == 3 || (flat && x.dim() == 2); }

// Of a vector: fewer would idle in every row of the output.
int64_t least_lanes() { return routines().panel / 2; }

int64_t idle_lanes(int64_t width) {
  const int64_t half = least_lanes();
  return (width + half - 1) / half * half - width;
}

}  // namespace

Outer outer_problem(const Tensor& a, const Tensor& delta, const Window& window, bool narrow_left,
                    bool flat) {
  for (const auto& [x, name] : {std::pair<const Tensor&, const char*>{a, "a"}, {delta, "delta"}}) {
    check_float(x, name);
    check_cpu(x, name);
  }
  STD_TORCH_CHECK(is_rows(delta, flat), "delta: expected [N, T, O], got ", delta.dim(), " dimensions");
  STD_TORCH_CHECK(window.empty() ? is_rows(a, flat) : a.dim() > 2, "a: expected ",
                  window.empty() ? "[N, T, I]" : "[N, C, *S]", ", got ", a.dim(), " dimensions");
  STD_TORCH_CHECK(!window.empty() || a.dim() == delta.dim(), "delta: expected ", a.dim(), " dimensions as a, got ",
                  delta.dim());
  STD_TORCH_CHECK(a.size(0) == delta.size(0), "a: expected ", delta.size(0), " samples, got ", a.size(0));
  const int64_t O = delta.size(delta.dim() - 1);
  int64_t I = window.empty() ? a.size(a.dim() - 1) : 0;
  std::vector<int64_t> positions{window.empty() ? positions_of(a) : a.size(1)};
  std::vector<int64_t> inputs{window.empty() ? I : a.size(1)};
  if (!window.empty()) {
    const Patches patches(a, window);
    positions = patches.outputs;
    inputs.insert(inputs.end(), patches.kernel.begin(), patches.kernel.end());
  }
  side(inputs, "a");
  side({O}, "delta");
  Outer p{};
  p.samples = delta.size(0);
  p.positions = positions_of(delta);
  STD_TORCH_CHECK(side(positions, "a") == p.positions, "delta: expected ", side(positions, "a"),
                  " positions, got ", p.positions);
  // Few positions write rows of the output directly, which wants the lanes along I.
  const int64_t on_a = idle_lanes(I) * O, on_d = idle_lanes(O) * I;
  const bool alike = on_d == on_a && (!narrow_left || I <= O);
  const bool few = p.positions == 1 || (p.positions <= SHORT_POSITIONS && I >= least_lanes());
  const bool on_delta = !window.empty() || (!few && (on_d < on_a || alike));
  p.left = !window.empty() ? patches(a, window) : on_delta ? rows(a) : rows(delta);
  p.right = on_delta ? lanes(delta) : lanes(a);
  if (!window.empty()) I = p.left_width();
  p.delta_right = on_delta;
  p.out_left = on_delta ? 1 : I;
  p.out_right = on_delta ? I : 1;
  p.out_size = O * I;
  return p;
}

Factors without_window(const Tensor& a, const Tensor& delta, const Window& window) {
  if (window.empty()) return {a, delta, window};
  const Outer p = outer_problem(a, delta, window);
  if (p.positions > SHORT_POSITIONS || p.left_width() < least_lanes()) return {a, delta, window};
  const int64_t size = p.positions * p.left_width();
  const Tensor rows = allocate(a, {p.samples, p.positions, p.left_width()});
  for_each_task(p.samples, [&](int64_t n) {
    float* to = floats(rows) + n * size;
    for (int64_t row : p.left.row)
      for (int64_t col : p.left.col) *to++ = p.left.data[n * p.left.sample + row + col];
  }, p.samples * size);
  return {rows, dense(delta, "delta"), {}};
}

void add_patches(Tensor to, const Tensor& rows, const Window& window) {
  const Left left = patches(to, window);
  const int64_t N = to.size(0), size = static_cast<int64_t>(left.row.size() * left.col.size());
  torch::stable::zero_(to);
  for_each_task(N, [&](int64_t n) {
    const float* from = floats(rows) + n * size;
    for (int64_t row : left.row)
      for (int64_t col : left.col) left.data[n * left.sample + row + col] += *from++;
  }, N * size);
}

Gradient gradient_of(const Outer& p, const Tensor& grad_a, const Tensor& grad_delta,
                     const Window& window) {
  const Tensor& to = p.delta_right ? grad_a : grad_delta;
  const Left left = window.empty() ? rows(to) : patches(to, window);
  return {left.data, left.sample, left.row, left.col, !window.empty(),
          floats(p.delta_right ? grad_delta : grad_a)};
}

}  // namespace fastdg
