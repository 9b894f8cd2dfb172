// Working memory that a thread keeps: fresh pages cost more than the work done in them.
#pragma once

#include <cstdint>

namespace fastdg {

// Returns at least `count` floats, aligned to a cache line; the next call on this thread at this level may
// move them. Routines use level 0, their callers level 1.
float* scratch(int64_t count, int level = 0);

// Size of an array of `count` floats that ends at a cache line.
inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Allocates arrays in one piece of scratch: add up the sizes first, then take each array.
class ScratchAllocator {
 public:
  explicit ScratchAllocator(int64_t total) : next_(scratch(total)) {}
  float* take(int64_t count) {
    float* piece = next_;
    next_ += padded(count);
    return piece;
  }

 private:
  float* next_;
};

}  // namespace fastdg
