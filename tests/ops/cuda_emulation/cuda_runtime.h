// Enough of the CUDA runtime to run csrc/columns_cuda.cu on the CPU, one block after the other.
//
// A thread of a block is a fiber. It runs until it waits for its warp or its block; then another one does,
// in an order shuffled by the seed that emulation_schedule sets (0: ascending), so that kernels which miss a
// barrier come to other results. Shared memory is poisoned before each block: what was not written reads as
// NaN, and a pointer that was not written leads to NaNs. Threads that wait at different barriers, an
// impossible grid and arguments of more than a kernel may take fail the launch, as they would on a device.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint64_t wide_accesses;  // of 16 bytes, since the library was loaded

// Accesses with a hint. An address that the type does not divide is a fault of the device.
template <class T>
T __ldcs(const T* p) {
  wide_accesses += sizeof(T) == 16;
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) abort();
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return __ldcs(p);
}
template <class T>
void __stcs(T* p, T value) {
  __ldcs(p);
  *p = value;
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };

namespace emulation {

constexpr unsigned WARP = 32, FULL = 0xffffffff;
constexpr size_t STACK = 1 << 16, SHARED_BYTES = 48 << 10;
constexpr size_t ARGUMENT_BYTES = CUDART_VERSION >= 12010 ? 32764 : 4096;
constexpr size_t PORTABLE_ARGUMENT_BYTES = CUDART_VERSION >= 13000 ? 32764 : 4096;  // before Volta too
inline const cudaStream_t STREAM = reinterpret_cast<cudaStream_t>(0x5eed);

enum class Wait { NOT, WARP, BLOCK, OVER };

struct Thread {
  ucontext_t begin;  // on a stack of its own; from then on it jumps, which spares two system calls
  jmp_buf at;
  bool begun;
  std::unique_ptr<char[]> stack{new char[STACK]};
  Wait waits;
  unsigned shuffles;  // so far
};

inline jmp_buf scheduler;
inline std::vector<Thread> threads;
inline unsigned current;
inline const std::function<void()>* kernel;
inline cudaError_t last_error = cudaSuccess;
inline const char* fault = "";
inline std::mt19937 shuffler;
inline bool shuffled = false;

inline double lanes[2][1024];  // of this shuffle and of the one before, which slower lanes may still read
inline std::vector<float> nowhere(1 << 20, NAN);
inline std::vector<float*> dynamic;  // the shared memory of a launch, and a canary behind it
inline std::set<void*> poisoned;

inline void fail(cudaError_t error, const char* why) { last_error = error, fault = why; }

inline void wait(Wait what) {
  Thread& thread = threads[current];
  thread.waits = what;
  if (_setjmp(thread.at) == 0) _longjmp(scheduler, 1);
}

inline void resume(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.at, 1);
  thread.begun = true;
  setcontext(&thread.begin);
}

inline void run_thread() {
  (*kernel)();
  wait(Wait::OVER);
}

// Lets those go on who wait, all of them, at one barrier; returns whether there are some.
inline bool release(unsigned begin, unsigned end, Wait barrier) {
  const auto is = [](Wait what) { return [what](const Thread& t) { return t.waits == what; }; };
  const auto first = threads.begin() + begin, last = threads.begin() + end;
  // Each lane that a shuffle names takes part in it; a block waits for those that are not over.
  const auto over = barrier == Wait::BLOCK ? std::count_if(first, last, is(Wait::OVER)) : 0;
  const auto waiting = std::count_if(first, last, is(barrier));
  if (waiting == 0 || waiting + over < last - first) return false;
  for (auto t = first; t != last; ++t)
    if (t->waits == barrier) t->waits = Wait::NOT;
  return true;
}

inline bool run_block(unsigned count) {
  poisoned.clear();
  std::fill(dynamic.begin(), dynamic.end(), nowhere.data());
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    getcontext(&thread.begin);
    thread.begin.uc_stack.ss_sp = thread.stack.get();
    thread.begin.uc_stack.ss_size = STACK;
    makecontext(&thread.begin, &run_thread, 0);
    thread.begun = false;
    thread.waits = Wait::NOT;
    thread.shuffles = 0;
  }
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned over = 0; over < count;) {
    if (shuffled) std::shuffle(order.begin(), order.end(), shuffler);
    for (unsigned t : order) {
      if (threads[t].waits != Wait::NOT) continue;
      current = t;
      threadIdx = dim3(t, 0, 0);
      resume(threads[t]);
      over += threads[t].waits == Wait::OVER;
    }
    bool released = over == count;
    for (unsigned warp = 0; warp < count; warp += WARP)
      released |= release(warp, std::min(warp + WARP, count), Wait::WARP);
    if (!released && !release(0, count, Wait::BLOCK)) {
      fail(cudaErrorLaunchFailure, "the threads of a block wait at different barriers");
      return false;
    }
  }
  if (dynamic.back() != nowhere.data()) fail(cudaErrorLaunchFailure, "shared memory is overrun");
  return last_error == cudaSuccess;
}

inline void run(dim3 grid, unsigned count, size_t shared, cudaStream_t stream, size_t arguments,
                const std::function<void()>& body) {
  if (grid.x == 0 || grid.y == 0 || grid.x > 0x7fffffff || grid.y > 65535 || count == 0 || count > 1024 ||
      count % WARP != 0 || shared > SHARED_BYTES)
    return fail(cudaErrorInvalidConfiguration, "an impossible grid");
  if (arguments > PORTABLE_ARGUMENT_BYTES)
    return fail(cudaErrorInvalidConfiguration, "too many bytes of arguments");
  if (stream != STREAM) return fail(cudaErrorInvalidConfiguration, "not torch's current stream");
  if (threads.size() < count) threads.resize(count);
  dynamic.assign((shared + sizeof(float*) - 1) / sizeof(float*) + 1, nullptr);
  kernel = &body;
  gridDim = grid, blockDim = dim3(count);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      if (!run_block(count)) return;
    }
}

// kernel<<<grid, threads, shared, stream>>>(arguments) is rewritten into launch(kernel, ...)(arguments).
template <class Kernel>
auto launch(const Kernel& call, dim3 grid, unsigned count, size_t shared, cudaStream_t stream) {
  return [=](const auto&... arguments) {
    run(grid, count, shared, stream, (sizeof(arguments) + ... + 0), [&] { call(arguments...); });
  };
}

// A __shared__ variable: the same memory for all threads of a block.
template <class Array>
Array& shared(Array& variable) {
  if (poisoned.insert(&variable).second) std::memset(&variable, 0xff, sizeof(variable));
  return variable;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::Wait::BLOCK); }

inline double __shfl_down_sync(unsigned mask, double value, unsigned delta) {
  using namespace emulation;
  if (mask != FULL) fail(cudaErrorLaunchFailure, "a shuffle of a part of a warp");
  const unsigned here = current;
  double* const values = lanes[threads[here].shuffles++ % 2];
  values[here] = value;
  wait(Wait::WARP);
  return here % WARP + delta < WARP ? values[here + delta] : value;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::fault; }
