// fastdg::outer_moments and fastdg::outer_domain on the CPU.
#include <tuple>

#include "blocks.h"
#include "geometry.h"
#include "moments.h"

namespace fastdg {

namespace {

constexpr int64_t TASKS_PER_THREAD = 6;  // so that uneven tasks still end together
constexpr int64_t LARGEST_ROWS = 1152;   // sums of a task stay in the second-level cache
constexpr int64_t LARGEST_COLUMNS = 512;
constexpr int64_t LEAST_COLUMNS = 256, MOST_COLUMNS = 1024;  // of a task of the derivative for few positions

// Results that are larger find no room in the caches, whoever reads them next.
constexpr int64_t LINE = 16;  // floats of a cache line
constexpr int64_t STREAM_BYTES = 16 << 20;

// Whether the moments go past the caches: then vectors of them are aligned to a cache line.
bool is_streamed(const Outer& p, int64_t domains, const float* mean, const float* variance) {
  const auto aligned = [](const float* x) { return reinterpret_cast<uintptr_t>(x) % 64 == 0; };
  return domains * p.out_size * 2 * int64_t{sizeof(float)} > STREAM_BYTES && p.right.width % LINE == 0 &&
         aligned(mean) && aligned(variance);
}

}  // namespace

void moments_of(const Outer& p, const Partition& partition, float* mean, float* variance) {
  const Routines& isa = routines();
  const int64_t D = partition.domains(), rows = p.left_width(), columns = p.right.width;
  if (p.out_size == 0 || D == 0) return;
  const bool rank1 = is_rank1(p), few = is_short(p) && variance != nullptr;
  const bool streamed = few && is_streamed(p, D, mean, variance);
  const int64_t width = rank1 || few ? block_size(columns, isa.panel, LARGEST_COLUMNS, 1) : isa.panel;
  const int64_t across = pieces(columns, width);
  const int64_t wanted = pieces(threads() > 1 ? threads() * TASKS_PER_THREAD : 1, D * across);
  const int64_t height = block_size(rows, 4 * isa.tile, rank1 ? rows : LARGEST_ROWS, wanted);
  const int64_t down = pieces(rows, height);
  for_each_task(D * across * down, [&](int64_t task) {
    const int64_t d = task / (across * down), column = task / down % across * width;
    const int64_t row = task % down * height;
    const Group group{partition.samples(d), partition.count(d)};
    const Range range{row, std::min(rows, row + height)};
    const Range lanes{column, std::min(columns, column + width)};
    float* m = mean + d * p.out_size;
    float* v = variance == nullptr ? nullptr : variance + d * p.out_size;
    if (group.count == 0 || p.positions == 0) {
      for (int64_t r = range.begin; r < range.end; ++r)
        for (int64_t c = lanes.begin; c < lanes.end; ++c) {
          m[p.out(r, c)] = 0;
          if (v != nullptr) v[p.out(r, c)] = 0;
        }
    } else if (rank1) {
      isa.moments_rank1(p, group, range, lanes, m, v);
    } else if (few) {
      isa.moments_short(p, group, range, lanes, streamed, m, v);
    } else {
      isa.moments(p, group, range, column, m, v);
    }
  }, work_of(p));
}

int64_t work_of(const Outer& p) {
  return static_cast<int64_t>(std::min(static_cast<double>(p.samples) * static_cast<double>(p.positions) *
                                           static_cast<double>(p.out_size), 0x1p62));
}

std::vector<int64_t> moments_shape(const Outer& p, const Partition& partition) {
  const int64_t left = p.left_width(), right = p.right.width;
  return {partition.domains(), p.delta_right ? right : left, p.delta_right ? left : right};
}

namespace {

// Several tasks of a domain share its right width; each has its own share of the left gradient.
template <class UpstreamOf>
void run_short_backward(const Outer& p, const Partition& partition, const Gradient& grad,
                        const UpstreamOf& upstream_of, const Tensor& grad_left) {
  const int64_t D = partition.domains(), columns = p.right.width;
  // Whatever the number of threads, so that sums do not depend on it.
  const int64_t wanted = columns < LEAST_COLUMNS ? 1 : std::max<int64_t>(2, columns / MOST_COLUMNS);
  const int64_t width = pieces(pieces(columns, wanted), LINE) * LINE;
  const int64_t parts = pieces(columns, width), size = grad_left.numel();
  const Tensor shares = allocate(grad_left, {parts - 1, size});
  for_each_task(D * parts, [&](int64_t task) {
    const int64_t d = task / parts, part = task % parts, begin = part * width;
    const Group group{partition.samples(d), partition.count(d)};
    if (group.count == 0) return;
    Gradient mine = grad;
    if (part > 0) mine.left = floats(shares) + (part - 1) * size;
    routines().backward_short(p, upstream_of(d), mine, group, {begin, std::min(columns, begin + width)});
  }, work_of(p));
  for_each_task(partition.covered(), [&](int64_t k) {
    const int64_t at = partition.samples(0)[k] * grad.left_sample;
    for (int64_t part = 1; part < parts; ++part) {
      const float* share = floats(shares) + (part - 1) * size + at;
      for (int64_t o = 0; o < grad.left_sample; ++o) grad.left[at + o] += share[o];
    }
  }, size * (parts - 1));
}

}  // namespace

std::tuple<Tensor, Tensor> outer_moments(const Tensor& a, const Tensor& delta, const Tensor& order,
                                         const Tensor& offsets, Window window) {
  const Factors factors = without_window(a, delta, window);
  const Outer p = outer_problem(factors.a, factors.delta, factors.window, /*narrow_left=*/true, /*flat=*/true);
  const Partition partition(order, offsets, p.samples);
  Tensor mean = allocate(a, moments_shape(p, partition));
  Tensor variance = allocate(a, moments_shape(p, partition));
  moments_of(p, partition, floats(mean), floats(variance));
  return {mean, variance};
}

std::tuple<Tensor, Tensor> outer_moments_backward(const Tensor& grad_mean,
                                                  const Tensor& grad_variance, const Tensor& a,
                                                  const Tensor& delta, const Tensor& mean,
                                                  const Tensor& order, const Tensor& offsets,
                                                  bool of_a, Window window) {
  const Factors factors = without_window(a, delta, window);
  const Outer p = outer_problem(factors.a, factors.delta, factors.window, /*narrow_left=*/false, /*flat=*/true);
  const Partition partition(order, offsets, p.samples);
  const std::vector<int64_t> sizes = moments_shape(p, partition);
  check_sizes(grad_mean, "grad_mean", sizes);
  check_sizes(grad_variance, "grad_variance", sizes);
  check_sizes(mean, "mean", sizes);
  const bool level = !is_expanded_zero(grad_mean);
  const Tensor upstream[] = {level ? dense(grad_mean, "grad_mean") : grad_mean,
                             dense(grad_variance, "grad_variance"), dense(mean, "mean")};
  const int64_t D = partition.domains();
  Tensor grad_a = of_a ? allocate(a, {a.sizes().begin(), a.sizes().end()}) : allocate(a, {0});
  Tensor grad_delta = allocate(delta, {delta.sizes().begin(), delta.sizes().end()});
  if (p.out_size == 0 || p.positions == 0 || partition.covered() < p.samples) {
    torch::stable::zero_(grad_a);
    torch::stable::zero_(grad_delta);
  }
  if (p.out_size == 0 || p.positions == 0 || D == 0) return {grad_a, grad_delta};
  const bool few = is_short(p), written = factors.window.size() < window.size();  // patches
  Tensor grad_rows = grad_a;
  if (few && (written || !of_a))  // its routine makes both gradients in one pass
    grad_rows = allocate(a, {p.samples, p.positions, p.right.width});
  else if (!of_a)
    grad_rows = factors.a;  // for its layout
  Gradient grad = gradient_of(p, grad_rows, grad_delta, factors.window);
  if (!few && !of_a) (p.delta_right ? grad.left : grad.right) = nullptr;
  const auto upstream_of = [&](int64_t d) {
    const int64_t at = d * p.out_size;
    return Upstream{level ? floats(upstream[0]) + at : nullptr, floats(upstream[1]) + at,
                    floats(upstream[2]) + at, partition.count(d)};
  };
  if (few) {
    if (written && partition.covered() < p.samples) torch::stable::zero_(grad_rows);
    run_short_backward(p, partition, grad, upstream_of, grad_delta);
    if (written && of_a) add_patches(grad_a, grad_rows, window);
    return {grad_a, grad_delta};
  }
  const int64_t groups = threads() > 1 ? pieces(2 * threads(), D) : 1;
  for_each_task(D * groups, [&](int64_t task) {
    const int64_t d = task / groups, count = partition.count(d), size = pieces(count, groups);
    const int64_t begin = std::min(count, task % groups * size);
    const Group group{partition.samples(d) + begin, std::min(size, count - begin)};
    if (group.count > 0) routines().backward(p, upstream_of(d), grad, group);
  }, work_of(p));
  return {grad_a, grad_delta};
}

Tensor outer_domain(const Tensor& a, const Tensor& delta, const Tensor& order, const Tensor& offsets,
                    Window window) {
  const Outer p = outer_problem(a, delta, window, /*narrow_left=*/true);
  const Partition partition(order, offsets, p.samples);
  Tensor mean = allocate(a, moments_shape(p, partition));
  moments_of(p, partition, floats(mean), nullptr);
  return mean;
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("outer_moments", TORCH_BOX(&fastdg::outer_moments));
  m.impl("outer_moments_backward", TORCH_BOX(&fastdg::outer_moments_backward));
  m.impl("outer_domain", TORCH_BOX(&fastdg::outer_domain));
}
