// Shared by all operators: argument checks, scratch memory, a work queue.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <vector>

#include "pool.h"
#include "scratch.h"

namespace fastdg {

using torch::stable::Tensor;
using Window = std::vector<int64_t>;

constexpr int64_t LARGEST_SIDE = int64_t{1} << 28;  // of N, D, T, I and O: no product of two leaves int64

// These checks keep the operators within their memory whatever they are given, by their own names too.
// fastdg/ops/checks says the same to users, in more words, before any backend runs.
inline void check_float(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float, name,
                  ": the compiled operator takes float32");
}

inline void check_cpu(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": expected a CPU tensor, as the first one is");
}

inline std::string listed(const std::vector<int64_t>& numbers) {
  std::string text = "[";
  for (int64_t number : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(number);
  return text + "]";
}

inline void check_sizes(const Tensor& x, const char* name, const std::vector<int64_t>& sizes) {
  const auto got = x.sizes();
  STD_TORCH_CHECK(std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()), name, ": expected shape ",
                  listed(sizes), ", got ", listed({got.begin(), got.end()}));
}

// The samples of each domain: order[offsets[d]] .. order[offsets[d + 1]].
struct Partition {
  std::vector<int64_t> order, offsets;

  Partition(const Tensor& order_tensor, const Tensor& offsets_tensor, int64_t samples)
      : order(read(order_tensor, "order")), offsets(read(offsets_tensor, "offsets")) {
    STD_TORCH_CHECK(!offsets.empty() && offsets.front() == 0 &&
                        offsets.back() == static_cast<int64_t>(order.size()),
                    "offsets: expected D + 1 ascending positions from 0 to ", order.size());
    for (size_t d = 1; d < offsets.size(); ++d)
      STD_TORCH_CHECK(offsets[d - 1] <= offsets[d], "offsets: expected ascending positions from 0 to ", order.size());
    for (int64_t n : order)
      STD_TORCH_CHECK(n >= 0 && n < samples, "order: sample ", n, " of ", samples);
    check_once(samples);
  }

  int64_t domains() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t covered() const { return offsets.back(); }
  int64_t count(int64_t d) const { return offsets[d + 1] - offsets[d]; }
  const int64_t* samples(int64_t d) const { return order.data() + offsets[d]; }

 private:
  // A sample of two domains would be written by both.
  void check_once(int64_t samples) const {
    const auto refuse = [](int64_t n) {
      STD_TORCH_CHECK(false, "order: sample ", n, " stands there twice");
    };
    if (samples / 64 > static_cast<int64_t>(order.size())) {  // a table of them would be the larger one
      std::vector<int64_t> sorted(order);
      std::sort(sorted.begin(), sorted.end());
      const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
      if (twice != sorted.end()) refuse(*twice);
      return;
    }
    std::vector<bool> seen(samples);
    for (int64_t n : order) {
      if (seen[n]) refuse(n);
      seen[n] = true;
    }
  }

  static std::vector<int64_t> read(const Tensor& x, const char* name) {
    check_cpu(x, name);
    STD_TORCH_CHECK(x.dim() == 1 && x.scalar_type() == torch::headeronly::ScalarType::Long, name,
                    ": expected a vector of int64");
    STD_TORCH_CHECK(x.size(0) <= LARGEST_SIDE + 1, name, ": expected at most ", LARGEST_SIDE,
                    " samples and domains, got ", x.size(0));
    std::vector<int64_t> values(x.size(0));
    const auto* data = static_cast<const int64_t*>(x.const_data_ptr());
    for (size_t k = 0; k < values.size(); ++k) values[k] = data[k * x.stride(0)];
    return values;
  }
};

inline Tensor dense(const Tensor& x, const char* name) {
  check_float(x, name);
  check_cpu(x, name);
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// An upstream gradient, where nothing asks for one: a zero, expanded. There is no need to read it.
inline bool is_expanded_zero(const Tensor& x) {
  check_float(x, "grad_mean");
  check_cpu(x, "grad_mean");
  for (int64_t k = 0; k < x.dim(); ++k)
    if (x.stride(k) != 0 && x.size(k) > 1) return false;
  return x.numel() > 1 && *floats(x) == 0;
}

inline void check_finite(double x, const char* name) {
  STD_TORCH_CHECK(std::isfinite(static_cast<float>(x)), name, ": expected a finite number of float32, got ", x);
}

// Of a mask by agreement: the common sign asked for, and the slope of the soft one.
inline void check_mask(double threshold, double steepness) {
  check_finite(threshold, "threshold");
  STD_TORCH_CHECK(steepness > 0, "steepness: expected a positive number, got ", steepness);
}

inline Tensor allocate_zeros(const Tensor& like, const std::vector<int64_t>& sizes) {
  Tensor out = allocate(like, sizes);
  torch::stable::zero_(out);
  return out;
}

inline int64_t threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Multiply-adds that are done before other threads have woken up; beside busy processes that takes longest.
constexpr int64_t LITTLE_WORK = int64_t{1} << 18;

// Runs task(0) .. task(count - 1) on torch's threads, or here if all of them together are little `work`;
// whoever is free takes the next one. The first exception ends the work and is thrown here: none may leave a
// thread through torch's C interface.
template <class Task>
void for_each_task(int64_t count, const Task& task, int64_t work = INT64_MAX) {
  if (count < 2 || work < LITTLE_WORK || threads() < 2) {
    for (int64_t k = 0; k < count; ++k) task(k);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::once_flag failed;
  torch::stable::parallel_for(0, std::min(count, threads()), 1, [&](int64_t, int64_t) {
    try {
      for (int64_t k = next++; k < count; k = next++) task(k);
    } catch (...) {
      next = count;
      std::call_once(failed, [&] { error = std::current_exception(); });
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace fastdg
