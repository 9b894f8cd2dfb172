#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace fastdg {

namespace {
struct Free {
  void operator()(void* p) const { std::free(p); }
};
struct Memory {
  std::unique_ptr<float, Free> floats;
  int64_t capacity = 0;
};
thread_local Memory levels[2];
}  // namespace

float* scratch(int64_t count, int level) {
  Memory& memory = levels[level];
  if (count > memory.capacity) {
    if (count > INT64_MAX / 8) throw std::bad_alloc();
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 4095) / 4096 * 4096;
    memory.floats.reset();
    memory.capacity = 0;
    memory.floats.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    if (!memory.floats) throw std::bad_alloc();
    memory.capacity = static_cast<int64_t>(bytes / sizeof(float));
  }
  return memory.floats.get();
}

}  // namespace fastdg
