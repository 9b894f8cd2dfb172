// 256-bit vectors: 6 x 16 accumulators take 12 of the 16 registers.
#include "isa_std.h"

#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FASTDG_ISA avx2
#define FASTDG_LANES 8
#define FASTDG_ROWS 6
#include "isa.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

namespace fastdg {
const Routines* avx2_routines() { return &avx2::table; }
}  // namespace fastdg
#else
namespace fastdg {
const Routines* avx2_routines() { return nullptr; }
}  // namespace fastdg
#endif
