// The arguments of fastdg::variance_gap, checked; the same for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "pool.h"
#include "routines.h"

namespace fastdg {

struct __attribute__((visibility("hidden"))) GapTensors {
  std::vector<GapTensor> tensors;
  const bool* present;
  int64_t domains;

  GapTensors(const std::vector<torch::stable::Tensor>& variance,
             const std::vector<torch::stable::Tensor>& ema, const torch::stable::Tensor& mask)
      : domains(mask.numel()) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(!variance.empty(), "variance: expected at least one tensor");
    STD_TORCH_CHECK(ema.empty() || ema.size() == variance.size(), "ema: expected none or ",
                    variance.size(), " tensors, got ", ema.size());
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 1,
                    "present: expected a vector of bool");
    check_device(mask, variance[0], "present");
    present = static_cast<const bool*>(keep(mask).const_data_ptr());
    for (size_t k = 0; k < variance.size(); ++k) {
      const int64_t size = domains > 0 ? variance[k].numel() / domains : 0;
      check_device(variance[k], variance[0], "variance");
      check(variance[k], variance[k], "variance");
      tensors.push_back({data(variance[k]), nullptr, nullptr, size});
      if (ema.empty()) continue;
      check(ema[k], variance[k], "ema");
      tensors.back().ema = data(ema[k]);
    }
  }

  // New tensors of the shapes of `variance`, which the entries then point to.
  std::vector<torch::stable::Tensor> make_gradients(
      const std::vector<torch::stable::Tensor>& variance) {
    std::vector<torch::stable::Tensor> grads;
    for (size_t k = 0; k < variance.size(); ++k) {
      const auto sizes = variance[k].sizes();
      grads.push_back(variance[k].is_cpu()
                          ? allocate(variance[k], {sizes.begin(), sizes.end()})
                          : torch::stable::new_empty(variance[k], sizes));
      tensors[k].grad = static_cast<float*>(grads[k].data_ptr());
    }
    return grads;
  }

  // A kernel would take the address of a tensor that lies elsewhere for one of its own.
  static void check_device(const torch::stable::Tensor& x, const torch::stable::Tensor& like,
                           const char* name) {
    STD_TORCH_CHECK(x.device() == like.device(), name, ": expected the device of variance[0]");
  }

 private:
  void check(const torch::stable::Tensor& x, const torch::stable::Tensor& like, const char* name) const {
    STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float, name,
                    ": the compiled operator takes float32");
    STD_TORCH_CHECK(x.dim() > 0 && x.size(0) == domains && x.numel() == like.numel(), name,
                    ": expected ", domains, " domains and ", like.numel(), " elements");
    check_device(x, like, name);
  }

  const torch::stable::Tensor& keep(const torch::stable::Tensor& x) {
    kept_.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
    return kept_.back();
  }

  const float* data(const torch::stable::Tensor& x) {
    return static_cast<const float*>(keep(x).const_data_ptr());
  }

  std::vector<torch::stable::Tensor> kept_;  // contiguous; alive as long as the pointers
};

}  // namespace fastdg
