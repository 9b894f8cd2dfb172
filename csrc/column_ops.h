// The column operators as PyTorch calls them: the tensors checked and gathered, then one launch for all of
// them. The same for CPU and CUDA; the includer defines `launch`.
#pragma once

#include <climits>
#include <cmath>
#include <tuple>
#include <utility>

#include "common.h"
#include "routines.h"

namespace fastdg {
namespace {

// The rows of many parameters: the same number for each, all of them contiguous.
class Operands {
 public:
  Operands(size_t tensors, int64_t width, const Tensor& like)
      : sizes_(tensors, -1), rows_(tensors * width), width_(width), like_(like) {}

  // x holds `count` rows of parameter k, one after the other.
  void put(size_t k, int64_t row, int64_t count, const Tensor& x, const char* name) {
    check_float(x, name);
    check_device(x, name);
    const int64_t size = count > 0 ? x.numel() / count : 0;
    if (sizes_[k] < 0) sizes_[k] = size;
    STD_TORCH_CHECK(size == sizes_[k], name, ": expected ", sizes_[k], " elements, got ", size);
    float* data = floats(contiguous(x));
    for (int64_t r = 0; r < count; ++r) rows_[k * width_ + row + r] = data + r * size;
  }

  // A vector of numbers for the operator itself.
  const Tensor& keep(const Tensor& x, const char* name) {
    check_device(x, name);
    return contiguous(x);
  }

  // A new tensor, whose rows are parameter k's last ones.
  Tensor add_result(size_t k, int64_t count, const std::vector<int64_t>& sizes) {
    const Tensor out = make(sizes);
    results_ = count;
    put(k, width_ - count, count, out, "result");
    return out;
  }

  Tensor make(const std::vector<int64_t>& sizes) const {
    return like_.is_cpu() ? allocate(like_, sizes) : torch::stable::new_empty(like_, sizes);
  }

  // Copies the results back to the tensors that are not contiguous.
  void write_back() {
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
  }

  int64_t tensors() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t width() const { return width_; }
  int64_t results() const { return results_; }
  int64_t size(int64_t k) const { return sizes_[k]; }
  float* const* rows(int64_t k) const { return rows_.data() + k * width_; }
  const Tensor& like() const { return like_; }

 private:
  // A kernel would take the address of a tensor that lies elsewhere for one of its own.
  void check_device(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.device() == like_.device(), name, ": expected the device of the first tensor");
  }

  const Tensor& contiguous(const Tensor& x) {
    if (x.is_contiguous()) return x;
    copies_.push_back({x, torch::stable::contiguous(x)});
    return copies_.back().second;
  }

  std::vector<int64_t> sizes_;
  std::vector<float*> rows_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
  int64_t width_, results_ = 0;
  Tensor like_;
};

// Where sums go: sum s of tensor k to data[s][k] where an operator has them by tensor, else to data[0][s].
struct Sums {
  float* data[2];
};

template <class Op>
void launch(const Op& op, const Operands& x, Sums sums);

std::vector<int64_t> sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// Rows are counted in int, three for each domain at most.
void check_count(int64_t domains) {
  STD_TORCH_CHECK(domains < INT_MAX / 4, "domains: there are too many, ", domains);
}

// Gradients in domain-major order; `more` rows are left for results.
Operands of_gradients(const std::vector<Tensor>& gradients, int64_t domains, int64_t more) {
  const size_t D = static_cast<size_t>(domains);
  check_count(domains);
  STD_TORCH_CHECK(domains > 0 && !gradients.empty() && gradients.size() % D == 0,
                  "gradients: expected as many for each of ", domains, " domains, got ", gradients.size());
  const size_t P = gradients.size() / D;
  Operands x(P, domains + more, gradients[0]);
  for (size_t d = 0; d < D; ++d)
    for (size_t k = 0; k < P; ++k) {
      check_sizes(gradients[d * P + k], "gradients", sizes_of(gradients[k]));
      x.put(k, static_cast<int64_t>(d), 1, gradients[d * P + k], "gradients");
    }
  return x;
}

std::vector<Tensor> add_results(Operands& x, int64_t count, const std::vector<Tensor>& like) {
  std::vector<Tensor> results;
  for (size_t k = 0; k < static_cast<size_t>(x.tensors()); ++k)
    results.push_back(x.add_result(k, count, sizes_of(like[k])));
  return results;
}

const float* weights_of(Operands& x, const Tensor& weights) {
  STD_TORCH_CHECK(weights.dim() == 1, "weights: expected a vector, got ", weights.dim(), " dimensions");
  check_float(weights, "weights");
  return static_cast<const float*>(x.keep(weights, "weights").const_data_ptr());
}

Tensor gram(const std::vector<Tensor>& gradients, int64_t domains) {
  const Operands x = of_gradients(gradients, domains, 0);
  Tensor products = x.make({domains, domains});
  launch(Gram{static_cast<int>(domains)}, x, {floats(products)});
  return products;
}

std::vector<Tensor> combine(const std::vector<Tensor>& gradients, const Tensor& weights) {
  const int64_t domains = weights.numel();
  Operands x = of_gradients(gradients, domains, 1);
  std::vector<Tensor> combined = add_results(x, 1, gradients);
  launch(Combine{weights_of(x, weights), static_cast<int>(domains)}, x, {});
  return combined;
}

std::vector<Tensor> combine_rows(const std::vector<Tensor>& rows, const Tensor& weights) {
  const int64_t domains = weights.numel();
  check_count(domains);
  STD_TORCH_CHECK(domains > 0 && !rows.empty(), "rows: expected at least one tensor and one domain");
  Operands x(rows.size(), domains + 1, rows[0]);
  std::vector<Tensor> combined;
  combined.reserve(rows.size());
  for (size_t k = 0; k < rows.size(); ++k) {
    STD_TORCH_CHECK(rows[k].dim() > 0 && rows[k].size(0) == domains, "rows: expected ", domains,
                    " domains in the first dimension");
    x.put(k, 0, domains, rows[k], "rows");
    const auto sizes = rows[k].sizes();
    combined.push_back(x.add_result(k, 1, {sizes.begin() + 1, sizes.end()}));
  }
  launch(Combine{weights_of(x, weights), static_cast<int>(domains)}, x, {});
  return combined;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> agreement(const std::vector<Tensor>& gradients,
                                                          const Tensor& weights, double threshold,
                                                          double steepness) {
  check_mask(threshold, steepness);
  const int64_t domains = weights.numel();
  Operands x = of_gradients(gradients, domains, 1);
  std::vector<Tensor> combined = add_results(x, 1, gradients);
  Tensor agreeing = x.make({x.tensors()}), magnitude = x.make({x.tensors()});
  const auto run = [&]<bool SOFT>() {
    const Agreement<SOFT> op{weights_of(x, weights), static_cast<int>(domains),
                             static_cast<float>(threshold), static_cast<float>(steepness)};
    launch(op, x, {floats(agreeing), floats(magnitude)});
  };
  if (std::isinf(steepness))
    run.template operator()<false>();
  else
    run.template operator()<true>();
  return {std::move(combined), agreeing, magnitude};
}

void check_written(const Tensor& x, const char* name) {
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(x.stride(d) != 0 || x.size(d) < 2, name, ": elements share memory, which is written to");
}

Tensor meta_step(const std::vector<Tensor>& parameters, const std::vector<Tensor>& kept, double rate) {
  STD_TORCH_CHECK(!parameters.empty() && parameters.size() == kept.size(), "kept: expected ",
                  parameters.size(), " tensors, at least 1, got ", kept.size());
  check_finite(rate, "rate");
  Operands x(parameters.size(), 2, parameters[0]);
  for (size_t k = 0; k < parameters.size(); ++k) {
    check_sizes(kept[k], "kept", sizes_of(parameters[k]));
    check_written(parameters[k], "parameters");
    check_written(kept[k], "kept");
    x.put(k, 0, 1, parameters[k], "parameters");
    x.put(k, 1, 1, kept[k], "kept");
  }
  Tensor squared = x.make({});
  launch(MetaStep{static_cast<float>(rate)}, x, {floats(squared)});
  x.write_back();
  return squared;
}

// The rows of variance_gap; `more` for each domain are left for results.
std::pair<Operands, Gap> of_variances(const std::vector<Tensor>& variance, const std::vector<Tensor>& ema,
                                      const Tensor& present, double history, int64_t more) {
  STD_TORCH_CHECK(!variance.empty(), "variance: expected at least one tensor");
  STD_TORCH_CHECK(ema.empty() || ema.size() == variance.size(), "ema: expected none or ",
                  variance.size(), " tensors, got ", ema.size());
  STD_TORCH_CHECK(present.scalar_type() == torch::headeronly::ScalarType::Bool && present.dim() == 1,
                  "present: expected a vector of bool");
  check_count(present.numel());
  check_finite(history, "history");
  const int64_t domains = present.numel(), operands = ema.empty() ? domains : 2 * domains;
  Operands x(variance.size(), operands + more * domains, variance[0]);
  const auto* here = static_cast<const bool*>(x.keep(present, "present").const_data_ptr());
  for (size_t k = 0; k < variance.size(); ++k) {
    STD_TORCH_CHECK(variance[k].dim() > 0 && variance[k].size(0) == domains, "variance: expected ", domains,
                    " domains in the first dimension");
    if (!ema.empty()) check_sizes(ema[k], "ema", sizes_of(variance[k]));
    x.put(k, 0, domains, variance[k], "variance");
    if (!ema.empty()) x.put(k, domains, domains, ema[k], "ema");
  }
  return {std::move(x), {here, static_cast<int>(domains), !ema.empty(), static_cast<float>(history)}};
}

Tensor variance_gap(const std::vector<Tensor>& variance, const std::vector<Tensor>& ema,
                    const Tensor& present, double history) {
  const auto [x, op] = of_variances(variance, ema, present, history, 0);
  Tensor gap = x.make({});
  launch(op, x, {floats(gap)});
  return gap;
}

std::vector<Tensor> variance_gap_backward(const Tensor& grad, const std::vector<Tensor>& variance,
                                          const std::vector<Tensor>& ema, const Tensor& present,
                                          double history) {
  auto [x, op] = of_variances(variance, ema, present, history, 1);
  check_float(grad, "grad");
  check_sizes(grad, "grad", {});
  std::vector<Tensor> grads = add_results(x, op.domains, variance);
  launch(GapGradient{op, floats(x.keep(grad, "grad"))}, x, {});
  return grads;
}

template <class Library>
void implement(Library& m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_rows", TORCH_BOX(&combine_rows));
  m.impl("agreement", TORCH_BOX(&agreement));
  m.impl("meta_step", TORCH_BOX(&meta_step));
  m.impl("variance_gap", TORCH_BOX(&variance_gap));
  m.impl("variance_gap_backward", TORCH_BOX(&variance_gap_backward));
}

}  // namespace
}  // namespace fastdg
