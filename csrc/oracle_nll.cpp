// fastdg::oracle_nll on the CPU.
#include <cmath>
#include <tuple>

#include "common.h"
#include "routines.h"

namespace fastdg {

namespace {

constexpr double FLOOR = 1e-5;  // of the variance

// Both maps [N, C, P], checked: either all positions of a channel lie side by side, in both of them, or
// all channels of a position do.
struct Maps {
  Tensor features, oracle;
  FeatureMaps maps;

  Maps(const Tensor& f, const Tensor& o) : features(f), oracle(o) {
    check_float(f, "features");
    check_cpu(f, "features");
    check_float(o, "oracle");
    check_cpu(o, "oracle");
    STD_TORCH_CHECK(f.dim() == 3 && o.dim() == 3, "features: expected two maps [N, C, P]");
    for (int64_t d = 0; d < 3; ++d)
      STD_TORCH_CHECK(f.size(d) == o.size(d), "oracle: expected the sizes of features");
    const bool rows = by_rows(f);
    if (!rows && !by_planes(f)) features = torch::stable::contiguous(f);
    if (rows ? !by_rows(o) : !by_planes(o)) oracle = rows ? as_rows(o) : torch::stable::contiguous(o);
    const int64_t step = rows ? 2 : 1;
    maps = {floats(features),      floats(oracle),      features.stride(0), oracle.stride(0),
            features.stride(step), oracle.stride(step), f.size(1),          f.size(2),
            !rows};
  }

  int64_t samples() const { return features.size(0); }

 private:
  static bool by_planes(const Tensor& x) { return x.size(2) < 2 || x.stride(2) == 1; }
  static bool by_rows(const Tensor& x) {
    return x.size(2) > 1 && x.stride(2) != 1 && (x.size(1) < 2 || x.stride(1) == 1);
  }
  static Tensor as_rows(const Tensor& x) {
    return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(x, 1, 2)), 1, 2);
  }
};

// The variance softplus(b) + FLOOR of a bias b, and its derivative.
struct Variance {
  double value, slope;

  explicit Variance(float b)
      : value((b > 20 ? b : std::log1p(std::exp(static_cast<double>(b)))) + FLOOR),
        slope(1 / (1 + std::exp(-static_cast<double>(b)))) {}
};

std::vector<Variance> variances(const Tensor& bias, int64_t channels) {
  const Tensor b = dense(bias, "bias");
  STD_TORCH_CHECK(b.dim() == 1 && b.size(0) == channels, "bias: expected ", channels, " values");
  return {floats(b), floats(b) + channels};
}

// Of one map, at least 1.
double elements(int64_t channels, int64_t positions) {
  return std::max(1.0, static_cast<double>(channels) * static_cast<double>(positions));
}

}  // namespace

std::tuple<Tensor, Tensor> oracle_nll(const Tensor& features, const Tensor& oracle,
                                      const Tensor& bias) {
  const Maps x(features, oracle);
  const int64_t C = x.maps.channels, P = x.maps.positions;
  const std::vector<Variance> variance = variances(bias, C);
  double logs = 0;
  for (const Variance& s : variance) logs += std::log(s.value) * static_cast<double>(P);
  const Tensor values = allocate(features, {x.samples()});
  const Tensor squares = allocate(features, {x.samples(), C});
  const double share = 0.5 / elements(C, P);
  for_each_task(x.samples(), [&](int64_t n) {
    float* own = floats(squares) + n * C;
    routines().oracle_squares(x.maps, n, own);
    double total = logs;
    for (int64_t c = 0; c < C; ++c) total += own[c] / variance[c].value;
    floats(values)[n] = static_cast<float>(total * share);
  });
  return {values, squares};
}

std::tuple<Tensor, Tensor> oracle_nll_backward(const Tensor& grad, const Tensor& features,
                                               const Tensor& oracle, const Tensor& bias,
                                               const Tensor& squares) {
  const Maps x(features, oracle);
  const int64_t N = x.samples(), C = x.maps.channels, P = x.maps.positions;
  const Tensor up = dense(grad, "grad"), sums = dense(squares, "squares");
  STD_TORCH_CHECK(up.dim() == 1 && up.size(0) == N, "grad: expected ", N, " values");
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == N && sums.size(1) == C,
                  "squares: expected [N, C]");
  const std::vector<Variance> variance = variances(bias, C);
  const double share = 1 / elements(C, P);

  const Tensor of_bias = allocate(bias, {C});
  for (int64_t c = 0; c < C; ++c) {
    const Variance s = variance[c];
    double total = 0;
    for (int64_t n = 0; n < N; ++n)
      total += floats(up)[n] * (static_cast<double>(P) - floats(sums)[n * C + c] / s.value);
    // A sum over no samples is 0 whatever the bias
    floats(of_bias)[c] = N == 0 ? 0 : static_cast<float>(total * 0.5 * share * s.slope / s.value);
  }

  // Laid out as the features are, which is how autograd goes on with it
  const bool planes = x.maps.planes;
  const Tensor memory = allocate(features, {N, planes ? C : P, planes ? P : C});
  for_each_task(N, [&](int64_t n) {
    std::vector<float> slope(C);
    for (int64_t c = 0; c < C; ++c)
      slope[c] = static_cast<float>(floats(up)[n] * share / variance[c].value);
    routines().oracle_slopes(x.maps, n, slope.data(), floats(memory) + n * C * P);
  });
  return {planes ? memory : torch::stable::transpose(memory, 1, 2), of_bias};
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("oracle_nll", TORCH_BOX(&fastdg::oracle_nll));
  m.impl("oracle_nll_backward", TORCH_BOX(&fastdg::oracle_nll_backward));
}
