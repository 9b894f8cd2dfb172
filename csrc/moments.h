// Moments by domain, written to given memory; shared by the operators of one tensor and of many.
#pragma once

#include "common.h"
#include "routines.h"

namespace fastdg {

// Gradients as rows of samples, a row without gaps. Keeps a copy where they lie otherwise.
struct __attribute__((visibility("hidden"))) DenseRows {
  Tensor kept;
  const float* data;
  int64_t samples, stride, columns;
};

// Of [N, *].
DenseRows dense_rows(const Tensor& grads);

// Mean and, unless null, variance of every domain.
void moments_of(const DenseRows& rows, const Partition& partition, float* mean, float* variance);
void moments_of(const Outer& p, const Partition& partition, float* mean, float* variance);

// [D, O, I].
std::vector<int64_t> moments_shape(const Outer& p, const Partition& partition);

// Multiply-adds of all samples.
int64_t work_of(const Outer& p);

}  // namespace fastdg
