// The column operators on CUDA: all parameters in one launch, no host synchronisation.
//
// The addresses of the tensors travel as a table in the kernel's argument; a list that exceeds it takes a
// launch per table. Each block sums its columns in a fixed order, and the blocks' sums are added up in a
// second launch, in a fixed order too: the same bits every time.

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "column_ops.h"

namespace fastdg {
namespace {

// -- functions for column.h on a float --

#define FASTDG_DEVICE __device__ __forceinline__
#define FASTDG_UNROLL _Pragma("unroll")
constexpr int TILE = 4;

FASTDG_DEVICE float sign(float x) { return x > 0 ? 1.f : x < 0 ? -1.f : x; }
FASTDG_DEVICE float absolute(float x) { return fabsf(x); }
FASTDG_DEVICE float reaches(float x, float threshold) { return x >= threshold ? 1.f : 0.f; }
FASTDG_DEVICE float positive(float x) { return x <= 0 ? 0.f : x; }
FASTDG_DEVICE float or_else(float x, float other) { return x == x ? x : other; }
FASTDG_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }

#include "column.h"

// -- the loop over the columns --

constexpr int WARP = 32, LEAST_WARPS = 8, MOST_WARPS = 16;  // of a block
constexpr int THREADS = 256;                                // of a block that adds up
constexpr int64_t BLOCK_COLUMNS = 8192;
constexpr int MOST_SUMS = TILE * TILE;  // of a pass

// A table has to fit the arguments of a kernel: 32764 bytes, but 4096 on the oldest devices of CUDA 12.
#if CUDART_VERSION >= 13000
constexpr int TENSORS = 192, ADDRESSES = 3600;
#else
constexpr int TENSORS = 40, ADDRESSES = 400;
#endif

struct Table {
  float* rows[ADDRESSES];
  int64_t size[TENSORS];
  int first_block[TENSORS + 1];  // of each tensor; the last entry is the grid
  bool aligned[TENSORS];         // all rows begin at a multiple of 16 bytes
  int count, width;
};
static_assert(sizeof(Table) < (CUDART_VERSION >= 13000 ? 32000 : 3900));

// Values that one pass alone reads, and results, take no room in the caches.
template <class Op>
constexpr bool READ_ONCE = true;
template <>
constexpr bool READ_ONCE<Gram> = false;
template <>
constexpr bool READ_ONCE<GapGradient> = false;

// Columns side by side: four of them in one access, or one.
template <class Op, int N>
struct Columns {
  float* const* rows;
  int64_t at;

  FASTDG_DEVICE Pack<float, N> from(int row) const {
    const float* p = rows[row] + at;
    if constexpr (N == 1) return {{read(p)}};
    else {
      const float4 x = read(reinterpret_cast<const float4*>(p));
      return {{x.x, x.y, x.z, x.w}};
    }
  }
  FASTDG_DEVICE void to(int row, const Pack<float, N>& value) const {
    float* p = rows[row] + at;
    if constexpr (N == 1) __stcs(p, value.x[0]);
    else __stcs(reinterpret_cast<float4*>(p), make_float4(value.x[0], value.x[1], value.x[2], value.x[3]));
  }

 private:
  template <class T>
  static FASTDG_DEVICE T read(const T* p) {
    if constexpr (READ_ONCE<Op>) return __ldcs(p);
    else return __ldg(p);  // no row is read and written here
  }
};

// Adds up the columns of a Pack.
struct Sum {
  float x = 0;

  template <int N>
  FASTDG_DEVICE void operator+=(const Pack<float, N>& value) {
    FASTDG_UNROLL for (int k = 0; k < N; ++k) x += value.x[k];
  }
};

template <int N, class Op, class Pass>
FASTDG_DEVICE void at_place(const Pass& pass, const Columns<Op, N>& x, Sum* sums) {
  State<Pass, Pack<float, N>> state;
  const int rows = rows_of(pass);
  for (int row = 0; row < rows; ++row) add(pass, x, row, state);
  finish(pass, x, state, sums);
}

// Threads `lane` of `lanes` over the columns; the sums of a thread in fp32, of a warp in double.
template <class Op, class Pass>
FASTDG_DEVICE void pass_over(const Pass& pass, float* const* rows, Range columns, bool aligned, int lane, int lanes,
                             double* sums) {
  constexpr int ROOM = Pass::SUMS > 0 ? Pass::SUMS : 1, N = 4;
  Sum here[ROOM];
  const int64_t whole = aligned ? columns.begin + (columns.end - columns.begin) / N * N : columns.begin;
  for (int64_t k = columns.begin + N * lane; k < whole; k += N * lanes)
    at_place<N>(pass, Columns<Op, N>{rows, k}, here);
  for (int64_t k = whole + lane; k < columns.end; k += lanes) at_place<1>(pass, Columns<Op, 1>{rows, k}, here);
  FASTDG_UNROLL for (int s = 0; s < Pass::SUMS; ++s) {
    double sum = here[s].x;
    for (int half = WARP / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffff, sum, half);
    if (threadIdx.x % WARP == 0) sums[s] = sum;
  }
}

// The warps of a block: every part of the operator has `groups` of them, which share the columns. Parts
// that would be more than the warps come in rounds.
struct Shape {
  int parts, at_once, groups;

  int threads() const { return at_once * groups * WARP; }
};

template <class Op>
Shape shape_of(const Op& op) {
  const int count = parts(op), rounds = (count + MOST_WARPS - 1) / MOST_WARPS;
  const int at_once = (count + rounds - 1) / rounds;
  return {count, at_once, (LEAST_WARPS + at_once - 1) / at_once};
}

// Adds up the columns of a block; sum s of all goes to sums[s * stride].
template <class Op>
__global__ void __launch_bounds__(MOST_WARPS * WARP)
    column_blocks(const Table table, const Op op, const Shape shape, double* sums, int64_t stride) {
  const int block = static_cast<int>(blockIdx.x);
  int tensor = 0;
  for (int end = table.count; end - tensor > 1;) {  // the last one that does not begin behind the block
    const int middle = (tensor + end) / 2;
    (table.first_block[middle] <= block ? tensor : end) = middle;
  }
  const int64_t begin = (block - table.first_block[tensor]) * BLOCK_COLUMNS;
  const int64_t size = table.size[tensor];
  const Range columns{begin, begin + BLOCK_COLUMNS < size ? begin + BLOCK_COLUMNS : size};

  extern __shared__ float* rows[];
  __shared__ double warp_sums[MOST_WARPS][MOST_SUMS];
  for (int row = static_cast<int>(threadIdx.x); row < table.width; row += static_cast<int>(blockDim.x))
    rows[row] = table.rows[tensor * table.width + row];
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
  const int group = warp / shape.at_once;
  for (int first = 0; first < shape.parts; first += shape.at_once) {
    const int part = first + warp % shape.at_once;
    if (part < shape.parts)
      with_part(op, part, [&](const auto& pass) {
        pass_over<Op>(pass, rows, columns, table.aligned[tensor], group * WARP + lane, shape.groups * WARP,
                      warp_sums[warp]);
      });
    __syncthreads();
    if (part < shape.parts && group == 0)
      with_part(op, part, [&](const auto& pass) {
        for (int s = lane; s < pass.SUMS; s += WARP) {
          double sum = 0;
          for (int g = 0; g < shape.groups; ++g) sum += warp_sums[warp + g * shape.at_once][s];
          sums[place_of(pass, s) * stride + block] = sum;
        }
      });
    __syncthreads();
  }
}

// The sum of all x, in thread 0.
__device__ double add_up(const double* x, int64_t count) {
  __shared__ double sums[THREADS];
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += THREADS) sum += x[k];
  sums[threadIdx.x] = sum;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

// A result of an operator that sums over all tensors.
template <class Op>
__global__ void __launch_bounds__(THREADS)
    add_blocks(const Op op, const double* sums, int64_t blocks, float* out) {
  const double sum = add_up(sums + source_of(op, blockIdx.x) * blocks, blocks);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(sum);
}

// Sum blockIdx.y of tensor blockIdx.x of a table.
__global__ void __launch_bounds__(THREADS)
    add_blocks_by_tensor(const Table table, const double* sums, int64_t stride, Sums out) {
  const int first = table.first_block[blockIdx.x], end = table.first_block[blockIdx.x + 1];
  const double sum = add_up(sums + blockIdx.y * stride + first, end - first);
  if (threadIdx.x == 0) out.data[blockIdx.y][blockIdx.x] = static_cast<float>(sum);
}

int64_t blocks_of(int64_t size) { return (size + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS; }

// Runs run(table, blocks before it, tensors before it) for as many tables as the tensors take.
template <class Run>
void for_each_table(const Operands& x, const Run& run) {
  STD_TORCH_CHECK(x.width() <= ADDRESSES, "gradients: there are too many domains, ", x.width(),
                  " rows for a table of ", ADDRESSES);
  Table table{};
  table.width = static_cast<int>(x.width());
  int64_t blocks = 0, tensors = 0;
  const auto flush = [&] {
    run(table, blocks, tensors);
    blocks += table.first_block[table.count];
    tensors += table.count;
    table.count = 0;
  };
  for (int64_t k = 0; k < x.tensors(); ++k) {
    constexpr int64_t MOST_BLOCKS = 1 << 30;
    const int64_t more = blocks_of(x.size(k));
    STD_TORCH_CHECK(more < MOST_BLOCKS, "a tensor of ", x.size(k), " elements is too large");
    if (table.count == TENSORS || (table.count + 1) * table.width > ADDRESSES ||
        table.first_block[table.count] + more >= MOST_BLOCKS)
      flush();
    std::copy_n(x.rows(k), table.width, table.rows + table.count * table.width);
    table.size[table.count] = x.size(k);
    table.aligned[table.count] = std::all_of(x.rows(k), x.rows(k) + table.width, [](const float* row) {
      return reinterpret_cast<uintptr_t>(row) % sizeof(float4) == 0;
    });
    table.first_block[table.count + 1] = table.first_block[table.count] + static_cast<int>(more);
    ++table.count;
  }
  flush();
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "columns: ", cudaGetErrorString(error));
}

template <class Op>
void launch(const Op& op, const Operands& x, Sums out) {
  const int32_t device = x.like().get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);

  int64_t blocks = 0;
  for (int64_t k = 0; k < x.tensors(); ++k) blocks += blocks_of(x.size(k));
  const int64_t width = sums_of(op);
  const Tensor parts =
      torch::stable::new_empty(x.like(), {width * blocks}, torch::headeronly::ScalarType::Double);
  auto* sums = static_cast<double*>(parts.data_ptr());
  const Shape shape = shape_of(op);
  for_each_table(x, [&](const Table& table, int64_t blocks_before, int64_t tensors_before) {
    const unsigned grid = table.first_block[table.count];
    if (grid > 0) {
      column_blocks<<<grid, shape.threads(), table.width * sizeof(float*), stream>>>(
          table, op, shape, sums + blocks_before, blocks);
      check_launch();
    }
    if constexpr (Op::BY_TENSOR) {
      const Sums here{out.data[0] + tensors_before, out.data[1] + tensors_before};
      const dim3 results(table.count, static_cast<unsigned>(width));
      add_blocks_by_tensor<<<results, THREADS, 0, stream>>>(table, sums + blocks_before, blocks, here);
      check_launch();
    }
  });
  if (!Op::BY_TENSOR && width > 0) {
    add_blocks<<<static_cast<unsigned>(width), THREADS, 0, stream>>>(op, sums, blocks, out.data[0]);
    check_launch();
  }
}

}  // namespace
}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cuda, CUDA, m) { fastdg::implement(m); }
