// How the operators on outer products cut a matrix into tasks.
#pragma once

#include <algorithm>

#include "routines.h"

namespace fastdg {

inline int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Blocks of at most `largest`, multiples of `unit`; more of them while there are fewer than `wanted`.
inline int64_t block_size(int64_t width, int64_t unit, int64_t largest, int64_t wanted) {
  const int64_t blocks = std::max(pieces(width, largest), std::max<int64_t>(1, wanted));
  return std::max<int64_t>(1, pieces(pieces(width, blocks), unit)) * unit;
}

// Few positions, and lanes along the output's rows: routines for these write and read the output as it lies.
constexpr int SHORT_POSITIONS = 8;
inline bool is_short(const Outer& p) { return p.positions <= SHORT_POSITIONS && !p.delta_right; }
inline bool is_rank1(const Outer& p) { return p.positions == 1 && !p.delta_right; }

}  // namespace fastdg
