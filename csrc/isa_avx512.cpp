// 512-bit vectors: 12 x 32 accumulators take 24 of the 32 registers.
#include "isa_std.h"

#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define FASTDG_ISA avx512
#define FASTDG_LANES 16
#define FASTDG_ROWS 12
#include "isa.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

namespace fastdg {
const Routines* avx512_routines() { return &avx512::table; }
}  // namespace fastdg
#else
namespace fastdg {
const Routines* avx512_routines() { return nullptr; }
}  // namespace fastdg
#endif
