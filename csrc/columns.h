// The column operators on the CPU: many tensors, a few rows each. Bound by memory. Included once per
// instruction set, inside its namespace.

// -- functions for column.h on a vector, and on a float for the columns that do not fill one --

#define FASTDG_DEVICE inline __attribute__((always_inline))
#define FASTDG_UNROLL _Pragma("GCC unroll 16")
constexpr int TILE = W == 16 ? 4 : 3;  // its sums and a row and a column of values fit the registers

FASTDG_DEVICE vec sign(vec x) {
  x = x > 0 ? vec{} + 1.f : x;
  return x < 0 ? vec{} - 1.f : x;
}
FASTDG_DEVICE float sign(float x) { return x > 0 ? 1.f : x < 0 ? -1.f : x; }

FASTDG_DEVICE vec absolute(vec x) {
  return reinterpret_cast<vec>(reinterpret_cast<ivec>(x) & 0x7fffffff);
}
FASTDG_DEVICE float absolute(float x) { return std::fabs(x); }

FASTDG_DEVICE vec reaches(vec x, float threshold) { return x >= threshold ? vec{} + 1.f : vec{}; }
FASTDG_DEVICE float reaches(float x, float threshold) { return x >= threshold ? 1.f : 0.f; }

FASTDG_DEVICE vec positive(vec x) { return x <= 0 ? vec{} : x; }
FASTDG_DEVICE float positive(float x) { return x <= 0 ? 0 : x; }

FASTDG_DEVICE vec or_else(vec x, float other) { return x == x ? x : vec{} + other; }
FASTDG_DEVICE float or_else(float x, float other) { return x == x ? x : other; }

// For |x| <= 87, within two roundings.
FASTDG_DEVICE vec exponential(vec x) {
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: a number added to it loses its fraction
  const vec shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
  const vec r = (x - n * 0x1.62ep-1f) - n * 3.1946183e-05f;  // x - n log(2), |r| <= log(2) / 2
  vec power = r * 0.0013934545f + 0.008363777f;
  power = power * r + 0.041666456f;
  power = power * r + 0.16666573f;
  power = power * r + 0.5f;
  power = power * r * r + r + 1.f;
  const ivec exponent = reinterpret_cast<ivec>(shifted) << 23;  // n, which fills the low bits
  return reinterpret_cast<vec>(reinterpret_cast<ivec>(power) + exponent);
}

// A polynomial in x^2 near 0, else 1 - 2 / (exp(2 |x|) + 1); within two roundings.
FASTDG_DEVICE vec hyperbolic_tangent(vec x) {
  const vec square = x * x;
  vec near = square * -0.006104947f + 0.02100364f;
  near = near * square - 0.0538525f;
  near = near * square + 0.13332783f;
  near = near * square - 0.33333328f;
  near = x + x * square * near;
  const vec size = absolute(x), y = size > 9.1f ? vec{} + 18.2f : size + size;  // NaN stays
  const vec far = 1.f - 2.f / (exponential(y) + 1.f);
  return size < 0.625f ? near : x < 0 ? -far : far;
}
FASTDG_DEVICE float hyperbolic_tangent(float x) { return std::tanh(x); }

#include "column.h"

// -- the loop over the columns --

constexpr int LINE = 16;         // floats of a cache line
constexpr int AHEAD = 8 * LINE;  // floats to prefetch; the processor itself stops at a page's end

template <class Value>
struct Columns;

template <int N>
struct Columns<Pack<vec, N>> {
  float* const* rows;
  int64_t at;
  bool streamed;

  FASTDG_DEVICE Pack<vec, N> from(int row) const {
    const float* p = rows[row] + at;
    if constexpr (N > 1)  // gram sees to it by itself
      FASTDG_UNROLL for (int k = 0; k < N * W; k += LINE) __builtin_prefetch(p + k + AHEAD);
    return Pack<vec, N>::each([p](int k) { return load(p + k * W); });
  }
  FASTDG_DEVICE void to(int row, const Pack<vec, N>& value) const {
    float* p = rows[row] + at;
    if (streamed)
      FASTDG_UNROLL for (int k = 0; k < N; ++k) stream(p + k * W, value.x[k]);
    else
      FASTDG_UNROLL for (int k = 0; k < N; ++k) store(p + k * W, value.x[k]);
  }
};

template <>
struct Columns<Pack<float, 1>> {
  float* const* rows;
  int64_t at;
  bool streamed;

  FASTDG_DEVICE Pack<float, 1> from(int row) const { return {rows[row][at]}; }
  FASTDG_DEVICE void to(int row, const Pack<float, 1>& value) const { rows[row][at] = value.x[0]; }
};

// Rows that are read side by side. In a cache of eight ways more would push one another out, as columns of
// large tensors, and their prefetched lines, often lie at equal distances from a page's begin.
constexpr int GROUP = 6;

template <bool FIRST, bool LAST, class Value, class Pass>
static inline void fold_group(const Pass& pass, const Rows& rows, Range group, Range columns,
                              State<Pass, Value>* waiting, Value* sums) {
  for (int64_t k = columns.begin; k < columns.end; k += sizeof(Value) / sizeof(float), ++waiting) {
    const Columns<Value> x{rows.data, k, rows.streamed};
    State<Pass, Value> state;
    if constexpr (!FIRST) state = *waiting;
    for (int64_t d = group.begin; d < group.end; ++d) add(pass, x, static_cast<int>(d), state);
    if constexpr (LAST)
      finish(pass, x, state, sums);
    else
      *waiting = state;
  }
}

// Groups of rows one after the other over a block; in between the states of its columns are waiting.
template <class Value, class Pass>
static inline void fold(const Pass& pass, const Rows& rows, Range columns, Value* sums) {
  const int count = rows_of(pass), groups = (count + GROUP - 1) / GROUP;
  State<Pass, Value>* waiting = nullptr;
  const auto run = [&]<bool FIRST, bool LAST>(int group) {
    const int64_t begin = FIRST ? 0 : count * group / groups;
    const int64_t end = LAST ? count : count * (group + 1) / groups;
    fold_group<FIRST, LAST>(pass, rows, {begin, end}, columns, waiting, sums);
  };
  if (groups <= 1) return run.template operator()<true, true>(0);
  const int64_t values = (columns.end - columns.begin) * sizeof(float) / sizeof(Value);
  constexpr int64_t FLOATS = sizeof(State<Pass, Value>) / sizeof(float);
  waiting = reinterpret_cast<State<Pass, Value>*>(scratch(values * FLOATS));
  run.template operator()<true, false>(0);
  for (int group = 1; group < groups - 1; ++group) run.template operator()<false, false>(group);
  run.template operator()<false, true>(groups - 1);
}

template <class Pass>
constexpr int ROOM = Pass::SUMS > 0 ? Pass::SUMS : 1;

// Adds to the results the sums of a pass: of whole Values, and of the columns from `rest` that fill none.
template <int N, class Pass>
static inline void add_up(const Pass& pass, const Rows& rows, Range rest, const Pack<vec, N>* wide,
                          double* results) {
  Pack<float, 1> single[ROOM<Pass>] = {};
  fold(pass, {rows.data, false}, rest, single);
  FASTDG_UNROLL for (int s = 0; s < Pass::SUMS; ++s) {
    vec sum = wide[s].x[0];
    FASTDG_UNROLL for (int n = 1; n < N; ++n) sum += wide[s].x[n];
    results[place_of(pass, s)] += add_lanes(sum) + single[s].x[0];
  }
}

// In blocks of columns few enough for sums in fp32, N vectors at a time.
template <int N, class Op>
static void columns(const Op& op, const Rows& rows, Range range, double* results) {
  with_part(op, 0, [&](const auto& pass) {
    for (int64_t k = range.begin; k < range.end; k += COLUMN_BLOCK) {
      const int64_t end = std::min(k + COLUMN_BLOCK, range.end), rest = k + (end - k) / (N * W) * (N * W);
      Pack<vec, N> sums[ROOM<std::decay_t<decltype(pass)>>] = {};
      fold(pass, rows, {k, rest}, sums);
      add_up<N>(pass, rows, {rest, end}, sums, results);
    }
  });
  if (rows.streamed) stream_end();
}

// A block in pieces whose rows stay in the first-level cache for all passes. Each pass also fetches its
// share of the next piece, two rows at most: memory is busy while we multiply. In between the sums wait.
static void gram(const Gram& op, const Rows& rows, Range range, double* results) {
  using Sums = Pack<vec, 1>[TILE * TILE];
  const int count = parts(op);
  auto* waiting = reinterpret_cast<Sums*>(scratch(count * int64_t{sizeof(Sums)} / sizeof(float)));
  const int64_t piece = std::clamp(GRAM_FLOATS / op.domains / W * W, LEAST_PIECE, LARGEST_PIECE);
  const auto for_each_pass = [&](const auto& run) {
    for (int part = 0; part < count; ++part)
      with_part(op, part, [&](const auto& pass) { run(pass, waiting[part], part); });
  };
  for (int64_t k = range.begin; k < range.end; k += COLUMN_BLOCK) {
    const int64_t end = std::min(k + COLUMN_BLOCK, range.end), rest = k + (end - k) / W * W;
    std::memset(waiting, 0, count * sizeof(Sums));
    for (int64_t c = k; c < rest; c += piece)
      for_each_pass([&](const auto& pass, Sums& sums, int part) {
        const float* next = rows.data[op.domains * part / count] + piece;
        const float* other = rows.data[(op.domains * (part + 1) - 1) / count] + piece;
        State<std::decay_t<decltype(pass)>, Pack<vec, 1>> state;
        Sums here;
        FASTDG_UNROLL for (int s = 0; s < pass.SUMS; ++s) here[s] = sums[s];
        for (int64_t x = c; x < std::min(c + piece, rest); x += W) {
          __builtin_prefetch(next + x);
          __builtin_prefetch(other + x);
          finish(pass, Columns<Pack<vec, 1>>{rows.data, x, false}, state, here);
        }
        FASTDG_UNROLL for (int s = 0; s < pass.SUMS; ++s) sums[s] = here[s];
      });
    for_each_pass([&](const auto& pass, Sums& sums, int) {
      add_up<1>(pass, rows, {rest, end}, sums, results);
    });
  }
}

#undef FASTDG_DEVICE
#undef FASTDG_UNROLL
