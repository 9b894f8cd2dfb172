// Large outputs from memory that is kept between calls.
//
// The statistics write D copies of the parameters at every step. The system allocator gives such blocks back to
// the kernel as soon as they are freed and then faults every page in again, which costs more than computing
// their contents. Blocks freed here are kept for the next request of about the same size.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastdg {

// A new contiguous fp32 CPU tensor, uninitialised. `like` says where an ordinary (small) one comes from.
torch::stable::Tensor allocate(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes);

}  // namespace fastdg
