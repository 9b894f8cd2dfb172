#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace fastdg {

namespace {
struct Free {
  void operator()(void* p) const { std::free(p); }
};
thread_local std::unique_ptr<float, Free> memory;
thread_local int64_t capacity = 0;
}  // namespace

float* scratch(int64_t count) {
  if (count > capacity) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 4095) / 4096 * 4096;
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    if (!memory) throw std::bad_alloc();
    capacity = static_cast<int64_t>(bytes / sizeof(float));
  }
  return memory.get();
}

}  // namespace fastdg
