// 128-bit vectors, which every machine has.
#include "isa_std.h"

#define FASTDG_ISA generic
#define FASTDG_LANES 4
#define FASTDG_ROWS 6
#include "isa.h"

namespace fastdg {
const Routines* generic_routines() { return &generic::table; }
}  // namespace fastdg
