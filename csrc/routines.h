// Operands of the operators, and the table of routines that an instruction set offers for them.
#pragma once

#include <concepts>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#ifdef __CUDACC__
#define FASTDG_ANYWHERE __host__ __device__
#else
#define FASTDG_ANYWHERE
#endif

namespace fastdg {

// The factor that is read element by element. Element (t, m) of sample n lies at
// data + n * sample + row[t] + col[m], which covers matrices of any strides and the patches of a
// convolution alike, so that patches are never written out.
struct Left {
  float* data;
  int64_t sample;
  std::vector<int64_t> row;  // [T]
  std::vector<int64_t> col;  // [M]
};

// The factor that fills vector lanes; it is packed before use.
struct Right {
  float* data;
  int64_t sample, row, col;
  int64_t width;  // V
};

// g_n = sum_t left[n, t] (x) right[n, t], with matrices of its shape addressed by two strides.
struct Outer {
  int64_t samples, positions;  // N, T
  Left left;
  Right right;
  bool delta_right;  // whether the right factor is delta (else a)
  int64_t out_left, out_right, out_size;  // element (m, v) of a [D, O, I] tensor; size of O * I

  int64_t left_width() const { return static_cast<int64_t>(left.col.size()); }
  int64_t out(int64_t m, int64_t v) const { return m * out_left + v * out_right; }
};

struct Group {  // samples of one domain
  const int64_t* samples;
  int64_t count;
};

struct Range {
  int64_t begin, end;
};

// Upstream gradients of a domain's moments, and its mean; each [O, I]. A grad_mean that is null is zero.
struct Upstream {
  const float *grad_mean, *grad_variance, *mean;
  int64_t count;  // samples of the domain
};

// Where the derivative goes: contiguous tensors of the factors' shapes; one that nobody asks for is null.
struct Gradient {
  float* left;
  int64_t left_sample;
  std::vector<int64_t> row, col;  // as in Left
  bool overlaps;                  // patches that share elements: contributions are added
  float* right;                   // [N, T, V]
};

// The tensors of one parameter: the operands of a column operator, then its results.
struct Rows {
  float* const* data;
  bool streamed;  // whether results go past the caches: then aligned to a cache line, all of them
};

// The column operators. SUMS: how many sums over the columns one pass makes; BY_TENSOR: whether these are
// wanted for each tensor, or of all of them.
struct Gram {
  static constexpr bool BY_TENSOR = false;
  int domains;
};

struct Combine {
  static constexpr int SUMS = 0;
  static constexpr bool BY_TENSOR = false;
  const float* weights;
  int domains;
};

template <bool SOFT>
struct Agreement {
  static constexpr int SUMS = 2;
  static constexpr bool BY_TENSOR = true;
  const float* weights;
  int domains;
  float threshold, steepness;
};

struct MetaStep {
  static constexpr int SUMS = 1;
  static constexpr bool BY_TENSOR = false;
  float rate;
};

struct Gap {
  static constexpr int SUMS = 1;
  static constexpr bool BY_TENSOR = false;
  const bool* present;
  int domains;
  bool kept;  // whether there is a history: a row for each domain after the variances'
  float history;
};

struct GapGradient : Gap {
  static constexpr int SUMS = 0;
  const float* grad;
};

// How many sums all passes make, and which of them gives result s.
template <class Op>
int64_t sums_of(const Op&) { return Op::SUMS; }
inline int64_t sums_of(const Gram& op) { return int64_t{op.domains} * op.domains; }

template <class Op>
FASTDG_ANYWHERE int64_t source_of(const Op&, int64_t s) { return s; }
inline FASTDG_ANYWHERE int64_t source_of(const Gram& op, int64_t s) {
  const int64_t row = s / op.domains, column = s % op.domains;
  return row <= column ? s : column * op.domains + row;
}

// One parameter's part of a column operator: writes its results, and adds to the sums.
template <class Op>
using ColumnRoutine = void(const Op&, const Rows&, Range columns, double* sums);

template <class... Ops>
using ColumnRoutines = std::tuple<ColumnRoutine<Ops>*...>;

// Embeddings and the texts they are compared with; see fastdg.ops.text_distance.
struct Texts {
  const float* embeddings;  // [N, width], `stride` from one to the next
  int64_t stride;
  const int64_t* labels;
  const float *classes, *anchors, *teacher;  // [C, width], [C, count, width], [C, count]
  int64_t count, width;                      // A and E
  float scale;                               // of the relative distance
};

// Two feature maps of the same sizes; see fastdg.ops.oracle_nll. Channels are rows of positions if
// `planes`, else positions are rows of channels; a step leads from one row to the next.
struct FeatureMaps {
  const float *features, *oracle;
  int64_t feature_sample, oracle_sample, feature_step, oracle_step;
  int64_t channels, positions;
  bool planes;
};

// A norm's input, the gradient at its result, and the one that comes back to the gradient at its input (or
// none), [N, T, C, S]; see fastdg.ops.norm_gradients. Positions S lie side by side if `planes`, else channels C
// do; a step leads from one channel, or position, to the next.
struct Norm {
  struct Map {
    const float* data;
    int64_t sample, row, step;

    const float* at(int64_t n, int64_t t, int64_t channel) const {
      return data + n * sample + t * row + channel * step;
    }
  };
  struct Statistic {  // [N, T, G], or none
    const float* data;
    int64_t sample, row, group;

    float at(int64_t n, int64_t t, int64_t g, float missing) const {
      return data == nullptr ? missing : data[n * sample + t * row + g * group];
    }
  };
  Map x, delta, up;
  Statistic mean, rstd;
  int64_t samples, rows, channels, positions, groups;
  bool planes, own;  // own: mean and rstd are those of x
  bool variance;     // whether rstd holds variances, to which eps is added
  float eps;

  float rstd_at(int64_t n, int64_t t, int64_t g) const {
    const float value = rstd.at(n, t, g, 1);
    return variance ? 1 / std::sqrt(value + eps) : value;
  }
};

// For each channel of a sample: the operands of the derivative of a norm's gradients (no gain is one of ones),
// and where its results go; the gain's is added to.
struct NormGradient {
  const float *slope, *shift, *gain;
  float *of_x, *of_delta, *of_gain;

  float gain_at(int64_t c) const { return gain == nullptr ? 1 : gain[c]; }
};

// An activation's input, the gradient at its result, and the one that comes back to the gradient at its input;
// where the derivative goes. See fastdg.ops.second.activation_derivative, and there for the kinds.
struct Activation {
  const float *x, *delta, *up;
  float *of_x, *of_delta;
  int64_t kind;
};
constexpr int64_t ACTIVATIONS = 3;

// What one thread does in one piece. Scratch belongs to the thread; outputs of two tasks never overlap.
struct Routines {
  const char* name;
  int64_t panel;  // lanes of a packed panel
  int64_t tile;   // rows of a register tile

  // Mean and variance (null: mean only) of the block `rows` x [column, column + panel) of one domain.
  void (*moments)(const Outer&, Group, Range rows, int64_t column, float* mean, float* variance);
  // Both for T = 1, where the squares factor: sum g^2 = sum left^2 (x) right^2. a is the right factor.
  void (*moments_rank1)(const Outer&, Group, Range rows, Range columns, float* mean,
                        float* variance);
  // Both for few positions, see is_short.
  void (*moments_short)(const Outer&, Group, Range rows, Range columns, bool streamed, float* mean,
                        float* variance);
  // Gradients of both factors for samples of one domain.
  void (*backward)(const Outer&, const Upstream&, const Gradient&, Group);
  // The same for few positions, from a part of the right width: grad.left gets that part's share.
  void (*backward_short)(const Outer&, const Upstream&, const Gradient&, Group, Range columns);
  // Squared norm of one sample's gradient, formed tile by tile.
  float (*norm_direct)(const Outer&, int64_t sample);
  // The same as sum_ts <left_t, left_s> <right_t, right_s>.
  float (*norm_gram)(const Outer&, int64_t sample);
  // Moments of `width` columns of given gradients, and their derivative by each sample's gradient.
  void (*dense_moments)(const float* grads, int64_t stride, Group, int64_t width, float* mean,
                        float* variance);
  void (*dense_moments_backward)(const Upstream&, const float* grads, int64_t stride, Group,
                                 int64_t width, float* out, int64_t out_stride);
  ColumnRoutines<Gram, Combine, Agreement<false>, Agreement<true>, MetaStep, Gap, GapGradient> columns;
  // Absolute and relative distances of samples, and the gradient of both.
  void (*text_distance)(const Texts&, Range samples, float* absolute, float* relative);
  void (*text_distance_backward)(const Texts&, const float* of_absolute, const float* of_relative,
                                 Range samples, float* out);
  // Of one sample: the square distance of each channel, and the gap times each channel's slope.
  void (*oracle_squares)(const FeatureMaps&, int64_t sample, float* squares);
  void (*oracle_slopes)(const FeatureMaps&, int64_t sample, const float* slope, float* out);
  // Of one sample: the gradients of some channels' weight and bias, and the derivative of these and of the
  // gradient at the input.
  void (*norm_sums)(const Norm&, int64_t sample, Range channels, float* weight, float* bias);
  void (*norm_derivative)(const Norm&, int64_t sample, const NormGradient&);
  // Of some elements.
  void (*activation_derivative)(const Activation&, Range);
};

const Routines* generic_routines();
const Routines* avx2_routines();    // null where the compiler cannot make them
const Routines* avx512_routines();

const Routines& routines();                      // the best this machine runs, unless set
std::string set_routines(const std::string& name);  // for tests; returns the name in use before

}  // namespace fastdg
