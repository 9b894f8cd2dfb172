// 128-bit vectors, which every machine has.
#include "outer_std.h"

#define FASTDG_ISA generic
#define FASTDG_LANES 4
#define FASTDG_ROWS 6
#include "outer_isa.h"

namespace fastdg {
const Routines* generic_routines() { return &generic::table; }
}  // namespace fastdg
