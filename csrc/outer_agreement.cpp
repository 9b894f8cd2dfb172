// fastdg::outer_agreement on the CPU: the domains' means of a block, which stay in the cache, then the mask.
#include <cmath>
#include <cstring>
#include <tuple>

#include "blocks.h"
#include "geometry.h"

namespace fastdg {

namespace {

constexpr int64_t BLOCK_FLOATS = 49152;  // of all domains, in the second-level cache
constexpr int64_t LEAST_TASKS = 12;      // however many threads there are: sums do not depend on it

// `p` with a block of the output, `stride` from one line to the next, in place of the whole.
Outer with_stride(Outer p, int64_t stride) {
  (p.out_right == 1 ? p.out_left : p.out_right) = stride;
  return p;
}

struct Blocks {
  int64_t rows, columns, height, width;

  Blocks(const Outer& p, int64_t domains, const Routines& isa)
      : rows(p.left_width()), columns(p.right.width) {
    const int64_t room = std::max<int64_t>(1, BLOCK_FLOATS / std::max<int64_t>(1, domains));
    const auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(room)));
    width = is_rank1(p) ? block_size(columns, isa.panel, std::max(isa.panel, side), 1) : isa.panel;
    const int64_t largest = std::max(isa.tile, room / width);
    height = block_size(rows, isa.tile, largest, pieces(LEAST_TASKS, across()));
  }

  int64_t across() const { return pieces(columns, width); }
  int64_t count() const { return across() * pieces(rows, height); }
  Range down(int64_t task) const {
    const int64_t begin = task / across() * height;
    return {begin, std::min(rows, begin + height)};
  }
  Range lanes(int64_t task) const {
    const int64_t begin = task % across() * width;
    return {begin, std::min(columns, begin + width)};
  }
};

template <class Op>
void apply(const Op& op, float* const* rows, int64_t size, double* sums) {
  std::get<ColumnRoutine<Op>*>(routines().columns)(op, {rows, false}, {0, size}, sums);
}

// The mean of a domain in a block of its own, lines one after the other.
void mean_of(const Outer& p, Group group, Range rows, Range lanes, float* block) {
  const int64_t height = rows.end - rows.begin, width = lanes.end - lanes.begin;
  float* origin = block - p.out(rows.begin, lanes.begin);  // where the routines' whole would begin
  if (group.count == 0 || p.positions == 0)
    std::memset(block, 0, sizeof(float) * height * width);
  else if (is_rank1(p))
    routines().moments_rank1(p, group, rows, lanes, origin, nullptr);
  else
    routines().moments(p, group, rows, lanes.begin, origin, nullptr);
}

void put(const Outer& p, Range rows, Range lanes, const float* block, float* out) {
  const int64_t height = rows.end - rows.begin, width = lanes.end - lanes.begin;
  const bool across = p.out_right == 1;
  for (int64_t k = 0; k < (across ? height : width); ++k) {
    float* to = out + (across ? p.out(rows.begin + k, lanes.begin) : p.out(rows.begin, lanes.begin + k));
    const int64_t length = across ? width : height;
    std::memcpy(to, block + k * length, sizeof(float) * length);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> outer_agreement(const Tensor& a, const Tensor& delta,
                                                   const Tensor& order, const Tensor& offsets,
                                                   const Tensor& weights, double threshold,
                                                   double steepness, Window window) {
  const Outer p = outer_problem(a, delta, window);
  const Partition partition(order, offsets, p.samples);
  const Tensor given = dense(weights, "weights");
  check_sizes(given, "weights", {partition.domains()});
  check_mask(threshold, steepness);
  std::vector<int64_t> present;
  std::vector<float> weight;
  for (int64_t d = 0; d < partition.domains(); ++d)
    if (floats(given)[d] != 0) {
      present.push_back(d);
      weight.push_back(floats(given)[d]);
    }
  const int64_t E = static_cast<int64_t>(present.size());
  Tensor combined = allocate(a, {delta.size(delta.dim() - 1), p.delta_right ? p.left_width() : p.right.width});
  const Tensor agreeing = allocate_zeros(a, {}), magnitude = allocate_zeros(a, {});
  if (p.out_size == 0 || E == 0) {
    torch::stable::zero_(combined);
    return {combined, agreeing, magnitude};
  }
  const Blocks blocks(p, E, routines());
  const bool across = p.out_right == 1;
  const int64_t line = across ? blocks.width : blocks.height;
  const int64_t edge = (across ? blocks.columns : blocks.rows) % line;
  const Outer whole = with_stride(p, line), last = with_stride(p, edge);
  std::vector<double> sums(2 * blocks.count());
  for_each_task(blocks.count(), [&](int64_t task) {
    const Range rows = blocks.down(task), lanes = blocks.lanes(task);
    const int64_t size = (rows.end - rows.begin) * (lanes.end - lanes.begin);
    const Range& lined = across ? lanes : rows;
    const Outer& inner = lined.end - lined.begin == line ? whole : last;
    float* memory = scratch(E * padded(size), 1);
    std::vector<float*> means;
    for (int64_t e = 0; e < E; ++e) {
      means.push_back(memory + e * padded(size));
      mean_of(inner, {partition.samples(present[e]), partition.count(present[e])}, rows, lanes, means[e]);
    }
    means.push_back(means[0]);  // the combination, in the first one's place
    const int domains = static_cast<int>(E);
    const auto tau = static_cast<float>(threshold), kappa = static_cast<float>(steepness);
    if (std::isinf(steepness))
      apply(Agreement<false>{weight.data(), domains, tau, kappa}, means.data(), size, &sums[2 * task]);
    else
      apply(Agreement<true>{weight.data(), domains, tau, kappa}, means.data(), size, &sums[2 * task]);
    put(p, rows, lanes, means[0], floats(combined));
  });
  double total[2] = {};
  for (size_t k = 0; k < sums.size(); ++k) total[k % 2] += sums[k];
  *floats(agreeing) = static_cast<float>(total[0]);
  *floats(magnitude) = static_cast<float>(total[1]);
  return {combined, agreeing, magnitude};
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("outer_agreement", TORCH_BOX(&fastdg::outer_agreement));
}
