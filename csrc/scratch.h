// Working memory that a thread keeps: fresh pages cost more than the work done in them.
#pragma once

#include <cstdint>

namespace fastdg {

// At least `count` floats, aligned to a cache line; the next call on this thread at this level may move
// them. Level 0 is the routines', level 1 that of what calls them.
float* scratch(int64_t count, int level = 0);

// Cuts scratch into arrays: first add up the sizes, then take the pieces.
class Carver {
 public:
  explicit Carver(int64_t total) : next_(scratch(total)) {}
  float* take(int64_t count) {
    float* piece = next_;
    next_ += padded(count);
    return piece;
  }
  static int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

 private:
  float* next_;
};

}  // namespace fastdg
