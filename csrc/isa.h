// The routines of one instruction set. The includer sets FASTDG_ISA (namespace), FASTDG_LANES and
// FASTDG_ROWS, includes the headers of this file, and only then switches the compiler to its target: code of
// shared headers must not be compiled for an instruction set that the machine may lack.

namespace fastdg {
namespace FASTDG_ISA {

#include "simd.h"

constexpr int64_t PANEL_FLOATS = 4096;  // half of a 32 KiB first-level cache
constexpr int64_t SUM_ROWS = 96;
constexpr int64_t RANK1_DEPTH = 256;
constexpr int64_t UPSTREAM_FLOATS = 32768;  // slope, level and H fit 512 KiB of second-level cache
constexpr int64_t UPSTREAM_ROWS = 252;
constexpr int64_t SHORT_DEPTH = 256;  // rows of all samples of a chunk
constexpr int64_t SHORT_COLUMNS = 512, SHORT_UPSTREAM_ROWS = 32;  // a block of slope and level: 128 KiB
constexpr int64_t SHORT_SAMPLES = 128;  // rows of all samples: right factor and gradient, 512 KiB
constexpr int64_t SHORT_FLOATS = 8192;
constexpr int64_t COLUMN_BLOCK = 1024;
constexpr int64_t GRAM_FLOATS = 4096, LEAST_PIECE = 128, LARGEST_PIECE = 256;  // half of that cache
constexpr int64_t ORACLE_CHANNELS = 1024, ORACLE_POSITIONS = 128;
constexpr int64_t NORM_POSITIONS = 128;

#include "columns.h"
#include "activation_derivative.h"
#include "dense.h"
#include "norm.h"
#include "norm_derivative.h"
#include "oracle.h"
#include "outer_backward.h"
#include "outer_forward.h"
#include "outer_norm.h"
#include "outer_rank1.h"
#include "outer_short.h"
#include "outer_short_backward.h"
#include "text.h"

static const Routines table{FASTDG_NAME(FASTDG_ISA),
                            R,
                            ROWS,
                            moments,
                            moments_rank1,
                            moments_short,
                            backward,
                            backward_short,
                            norm_direct,
                            norm_gram,
                            dense_moments,
                            dense_moments_backward,
                            {gram, columns<4, Combine>, columns<4, Agreement<false>>,
                             columns<2, Agreement<true>>, columns<4, MetaStep>, columns<2, Gap>,
                             columns<2, GapGradient>},
                            text_distance,
                            text_distance_backward,
                            oracle_squares,
                            oracle_slopes,
                            norm_sums,
                            norm_derivative,
                            activation_derivative};

}  // namespace FASTDG_ISA
}  // namespace fastdg
