// fastdg::norm_gradients on the CPU.
#include <optional>
#include <tuple>

#include "blocks.h"
#include "common.h"
#include "routines.h"

namespace fastdg {

namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t LEAST_CHANNELS = 64;  // of a task, where there are few samples

// All maps [N, T, C, S], checked: either all positions of a channel lie side by side, in each of them, or
// all channels of a position do.
struct Maps {
  Tensor x, delta, up;  // up: x itself, if there is none
  bool rows;  // of positions with their channels side by side, as results are laid out then
  Norm norm;

  Maps(const Tensor& input, const Tensor& at_result, const Optional& mean, const Optional& rstd, bool own,
       const std::optional<double>& eps, const Optional& coming)
      : x(input), delta(at_result), up(coming.value_or(input)), rows(by_rows(x) && by_rows(delta) && by_rows(up)),
        norm{} {
    check_map(x, "x");
    check_map(delta, "delta");
    check_sizes(delta, "delta", {x.sizes().begin(), x.sizes().end()});
    check_map(up, "grad_input");
    check_sizes(up, "grad_input", {x.sizes().begin(), x.sizes().end()});
    STD_TORCH_CHECK(rstd.has_value() || !(own || mean.has_value()), "rstd: expected one with mean");
    const bool planes = !rows && x.size(3) != 1;
    x = side_by_side(x, rows, planes);
    delta = side_by_side(delta, rows, planes);
    norm.samples = x.size(0), norm.rows = x.size(1), norm.channels = x.size(2), norm.positions = x.size(3);
    norm.groups = rstd.has_value() ? groups_of(*rstd) : 1;
    norm.planes = planes, norm.own = own;
    if (eps.has_value()) check_finite(*eps, "eps");
    norm.variance = eps.has_value(), norm.eps = static_cast<float>(eps.value_or(0));
    norm.x = map_of(x, planes), norm.delta = map_of(delta, planes);
    if (coming.has_value()) norm.up = map_of(up = side_by_side(up, rows, planes), planes);
    norm.mean = statistic_of(mean, "mean"), norm.rstd = statistic_of(rstd, "rstd");
  }

 private:
  static void check_map(const Tensor& x, const char* name) {
    check_float(x, name);
    check_cpu(x, name);
    STD_TORCH_CHECK(x.dim() == 4, name, ": expected [N, T, C, S], got ", x.dim(), " dimensions");
  }
  static bool by_rows(const Tensor& x) {
    return x.dim() == 4 && x.size(3) > 1 && x.stride(3) != 1 && (x.size(2) < 2 || x.stride(2) == 1);
  }
  static Tensor side_by_side(const Tensor& x, bool rows, bool planes) {
    if (rows) return x;
    const bool there = planes ? x.size(3) < 2 || x.stride(3) == 1 : x.size(2) < 2 || x.stride(2) == 1;
    return there ? x : torch::stable::contiguous(x);
  }
  static Norm::Map map_of(const Tensor& x, bool planes) {
    if (x.numel() == 0) return {nullptr, 0, 0, 0};
    return {floats(x), x.stride(0), x.stride(1), planes ? x.stride(2) : x.stride(3)};
  }
  int64_t groups_of(const Tensor& rstd) const {
    STD_TORCH_CHECK(rstd.dim() == 3, "rstd: expected [N, T, G], got ", rstd.dim(), " dimensions");
    const int64_t groups = rstd.size(2);
    STD_TORCH_CHECK(groups > 0 && x.size(2) % groups == 0, "rstd: expected groups that divide ", x.size(2),
                    " channels, got ", groups);
    return groups;
  }
  Norm::Statistic statistic_of(const Optional& given, const char* name) const {
    if (!given.has_value()) return {nullptr, 0, 0, 0};
    check_float(*given, name);
    check_cpu(*given, name);
    check_sizes(*given, name, {norm.samples, norm.rows, norm.groups});
    if (given->numel() == 0) return {nullptr, 0, 0, 0};
    return {floats(*given), given->stride(0), given->stride(1), given->stride(2)};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> norm_gradients(const Tensor& x, const Tensor& delta, Optional mean,
                                          Optional rstd, bool own, std::optional<double> eps) {
  const Maps maps(x, delta, mean, rstd, own, eps, std::nullopt);
  const Norm& p = maps.norm;
  const Tensor weight = allocate(x, {p.samples, p.channels}), bias = allocate(x, {p.samples, p.channels});
  if (x.numel() == 0) {
    Tensor of_weight = weight, of_bias = bias;
    return {torch::stable::zero_(of_weight), torch::stable::zero_(of_bias)};
  }
  const int64_t wanted = pieces(2 * threads(), p.samples);  // whatever their number, sums are the same
  const int64_t width = block_size(p.channels, LEAST_CHANNELS, p.channels, wanted);
  const int64_t blocks = pieces(p.channels, width);
  for_each_task(p.samples * blocks, [&](int64_t task) {
    const int64_t n = task / blocks, begin = task % blocks * width, at = n * p.channels + begin;
    routines().norm_sums(p, n, {begin, std::min(p.channels, begin + width)}, floats(weight) + at,
                         floats(bias) + at);
  }, 2 * x.numel());
  return {weight, bias};
}

std::tuple<Tensor, Tensor, Tensor> norm_gradients_backward(
    const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& x, const Tensor& delta, Optional mean,
    Optional rstd, bool own, std::optional<double> eps, Optional gain, Optional grad_input) {
  const Maps maps(x, delta, mean, rstd, own, eps, grad_input);
  const Norm& p = maps.norm;
  check_sizes(grad_weight, "grad_weight", {p.samples, p.channels});
  check_sizes(grad_bias, "grad_bias", {p.samples, p.channels});
  const Tensor slope = dense(grad_weight, "grad_weight"), shift = dense(grad_bias, "grad_bias");
  Optional gains;
  if (gain.has_value()) {
    check_sizes(*gain, "gain", {p.channels});
    gains = dense(*gain, "gain");
  }
  std::vector<int64_t> sizes{p.samples, p.rows, p.channels, p.positions};
  if (maps.rows) std::swap(sizes[2], sizes[3]);
  const Tensor of_x = allocate(x, sizes), of_delta = allocate(x, sizes);
  Tensor of_gain = allocate(x, {p.samples, p.channels});
  of_gain = torch::stable::zero_(of_gain);
  const int64_t size = p.rows * p.channels * p.positions, C = p.channels;
  for_each_task(x.numel() == 0 ? 0 : p.samples, [&](int64_t n) {
    const NormGradient gradient{floats(slope) + n * C, floats(shift) + n * C,
                                gains.has_value() ? floats(*gains) : nullptr,
                                floats(of_x) + n * size, floats(of_delta) + n * size, floats(of_gain) + n * C};
    routines().norm_derivative(p, n, gradient);
  }, (grad_input.has_value() ? 8 : 4) * x.numel());
  if (!maps.rows) return {of_x, of_delta, of_gain};
  return {torch::stable::transpose(of_x, 2, 3), torch::stable::transpose(of_delta, 2, 3), of_gain};
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("norm_gradients", TORCH_BOX(&fastdg::norm_gradients));
  m.impl("norm_gradients_backward", TORCH_BOX(&fastdg::norm_gradients_backward));
}
