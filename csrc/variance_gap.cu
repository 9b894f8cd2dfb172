// fastdg::variance_gap on CUDA: all parameters in one launch, no host synchronisation.
//
// The tensors travel as a table in the kernel's argument; a list that exceeds it takes a launch per table.
// Each block sums its columns in a fixed order, and one block adds up the blocks: the same bits every time.

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "gap.h"

namespace fastdg {
namespace {

template <class Value>
struct Read;

template <>
struct Read<float> {
  static __device__ __forceinline__ float from(const float* p) { return __ldg(p); }
  static __device__ __forceinline__ void to(float* p, float x) { *p = x; }
};

#define FASTDG_DEVICE __device__ __forceinline__
#include "column.h"

using torch::stable::Tensor;

constexpr int THREADS = 256;
constexpr int COLUMNS = 4 * THREADS;  // of a block
constexpr int TENSORS = 64;           // of a table: it has to fit the 4 KiB of a kernel's arguments

struct Table {
  GapTensor tensors[TENSORS];
  int first_block[TENSORS + 1];  // of each tensor; the last entry is the grid
  int count;
};
static_assert(sizeof(Table) < 3500);

struct Place {
  int tensor;
  int64_t begin, end;  // columns
};

__device__ Place place_of(const Table& table) {
  int k = 0;
  while (static_cast<int>(blockIdx.x) >= table.first_block[k + 1]) ++k;
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[k]) * COLUMNS;
  const int64_t size = table.tensors[k].size;
  return {k, begin, begin + COLUMNS < size ? begin + COLUMNS : size};
}

// The sum over the threads of a block, in thread 0.
__device__ double add_threads(double x) {
  __shared__ double sums[THREADS];
  sums[threadIdx.x] = x;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

__global__ void __launch_bounds__(THREADS, 4)
    gap_blocks(Table table, const bool* present, int domains, float history, double* sums) {
  const Place place = place_of(table);
  const GapTensor& x = table.tensors[place.tensor];
  double sum = 0;
  for (int64_t k = place.begin + threadIdx.x; k < place.end; k += THREADS)
    sum += gap_value(GapColumn<float>{x.variance, x.ema, x.size, k, history}, present, domains);
  sum = add_threads(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS) gap_total(const double* sums, int64_t count, float* total) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += THREADS) sum += sums[k];
  sum = add_threads(sum);
  if (threadIdx.x == 0) *total = static_cast<float>(sum);
}

__global__ void __launch_bounds__(THREADS, 4)
    gap_gradients(Table table, const bool* present, int domains, float history, const float* grad) {
  const Place place = place_of(table);
  const GapTensor& x = table.tensors[place.tensor];
  const float scale = 2 * *grad;
  for (int64_t k = place.begin + threadIdx.x; k < place.end; k += THREADS)
    gap_gradient(GapColumn<float>{x.variance, x.ema, x.size, k, history}, present, domains, scale,
                 x.grad);
}

int64_t blocks_of(const GapTensor& x) { return (x.size + COLUMNS - 1) / COLUMNS; }

// Runs launch(table, blocks before it) for as many tables as the tensors take.
template <class Launch>
void for_each_table(const GapTensors& x, const Launch& launch) {
  Table table{};
  int64_t before = 0;
  const auto flush = [&] {
    if (table.count > 0) launch(table, before);
    before += table.first_block[table.count];
    table = Table{};
  };
  for (const GapTensor& tensor : x.tensors) {
    if (tensor.size == 0) continue;
    STD_TORCH_CHECK(blocks_of(tensor) < (int64_t{1} << 30), "variance: a tensor is too large");
    if (table.count == TENSORS || table.first_block[table.count] + blocks_of(tensor) >= (1 << 30))
      flush();
    table.tensors[table.count] = tensor;
    table.first_block[table.count + 1] =
        table.first_block[table.count] + static_cast<int>(blocks_of(tensor));
    ++table.count;
  }
  flush();
}

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "variance_gap: ", cudaGetErrorString(error));
}

Tensor variance_gap(const std::vector<Tensor>& variance, const std::vector<Tensor>& ema,
                    const Tensor& present, double history) {
  const GapTensors x(variance, ema, present);
  const torch::stable::accelerator::DeviceGuard guard(variance[0].get_device_index());
  const cudaStream_t stream = stream_of(variance[0]);
  int64_t blocks = 0;
  for (const GapTensor& tensor : x.tensors) blocks += blocks_of(tensor);
  const Tensor sums =
      torch::stable::new_empty(variance[0], {blocks}, torch::headeronly::ScalarType::Double);
  const Tensor total = torch::stable::new_empty(variance[0], {});
  auto* partial = static_cast<double*>(sums.data_ptr());
  for_each_table(x, [&](const Table& table, int64_t before) {
    gap_blocks<<<table.first_block[table.count], THREADS, 0, stream>>>(
        table, x.present, static_cast<int>(x.domains), static_cast<float>(history),
        partial + before);
    check_launch();
  });
  gap_total<<<1, THREADS, 0, stream>>>(partial, blocks, static_cast<float*>(total.data_ptr()));
  check_launch();
  return total;
}

std::vector<Tensor> variance_gap_backward(const Tensor& grad, const std::vector<Tensor>& variance,
                                          const std::vector<Tensor>& ema, const Tensor& present,
                                          double history) {
  GapTensors x(variance, ema, present);
  GapTensors::check_device(grad, variance[0], "grad");
  STD_TORCH_CHECK(grad.scalar_type() == torch::headeronly::ScalarType::Float && grad.numel() == 1,
                  "grad: expected one float32 number");
  const std::vector<Tensor> grads = x.make_gradients(variance);
  const torch::stable::accelerator::DeviceGuard guard(variance[0].get_device_index());
  const cudaStream_t stream = stream_of(variance[0]);
  for_each_table(x, [&](const Table& table, int64_t) {
    gap_gradients<<<table.first_block[table.count], THREADS, 0, stream>>>(
        table, x.present, static_cast<int>(x.domains), static_cast<float>(history),
        static_cast<const float*>(grad.const_data_ptr()));
    check_launch();
  });
  return grads;
}

}  // namespace
}  // namespace fastdg

STABLE_TORCH_LIBRARY_FRAGMENT(fastdg_cuda, m) {
  m.def("variance_gap(Tensor[] variance, Tensor[] ema, Tensor present, float history) -> Tensor");
  m.def("variance_gap_backward(Tensor grad, Tensor[] variance, Tensor[] ema, Tensor present, "
        "float history) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastdg_cuda, CUDA, m) {
  m.impl("variance_gap", TORCH_BOX(&fastdg::variance_gap));
  m.impl("variance_gap_backward", TORCH_BOX(&fastdg::variance_gap_backward));
}
