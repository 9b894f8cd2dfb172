// Column operators: the computation on the domains' values at one place of one parameter.
//
// Included by the CPU launcher inside the namespace of an instruction set, where a Value is a few vectors
// of adjacent columns, and by the CUDA launcher, where it is a few floats: one arithmetic for both. The
// includer defines FASTDG_DEVICE, the qualifiers of a function; FASTDG_UNROLL, before a short loop; TILE,
// rows and columns of a tile of products; and for its Scalars the functions that FASTDG_LIFT lifts.
//
// The tensors of one parameter are its rows. x.from(row) reads the Value of a place, x.to(row, value)
// writes it. An operator makes parts(op) passes over the columns, given one by one by with_part. At a place
// a pass adds its rows_of(pass) rows one after the other to a State, and then finishes. Its SUMS sums, of a
// type to which Values are added, go to the operator's results at place_of(pass, sum).

// Scalars side by side: independent chains of operations.
template <class Scalar, int N>
struct Pack {
  Scalar x[N];

  template <class F>
  static FASTDG_DEVICE Pack each(const F& f) {
    Pack out;
    FASTDG_UNROLL for (int k = 0; k < N; ++k) out.x[k] = f(k);
    return out;
  }
  friend FASTDG_DEVICE Pack operator+(const Pack& a, const Pack& b) {
    return each([&](int k) { return a.x[k] + b.x[k]; });
  }
  friend FASTDG_DEVICE Pack operator-(const Pack& a, const Pack& b) {
    return each([&](int k) { return a.x[k] - b.x[k]; });
  }
  friend FASTDG_DEVICE Pack operator*(const Pack& a, const Pack& b) {
    return each([&](int k) { return a.x[k] * b.x[k]; });
  }
  friend FASTDG_DEVICE Pack operator-(const Pack& a, float b) {
    return each([&](int k) { return a.x[k] - b; });
  }
  friend FASTDG_DEVICE Pack operator*(float a, const Pack& b) {
    return each([&](int k) { return a * b.x[k]; });
  }
  friend FASTDG_DEVICE Pack operator/(float a, const Pack& b) {
    return each([&](int k) { return a / b.x[k]; });
  }
  friend FASTDG_DEVICE Pack operator/(const Pack& a, float b) {
    return each([&](int k) { return a.x[k] / b; });
  }
  FASTDG_DEVICE void operator+=(const Pack& b) { *this = *this + b; }
};

#define FASTDG_LIFT(function)                                                      \
  template <class Scalar, int N, class... Rest>                                    \
  FASTDG_DEVICE auto function(const Pack<Scalar, N>& a, Rest... rest) {             \
    Pack<decltype(function(a.x[0], rest...)), N> out;                               \
    FASTDG_UNROLL for (int k = 0; k < N; ++k) out.x[k] = function(a.x[k], rest...); \
    return out;                                                                    \
  }
FASTDG_LIFT(sign)                // -1, 0 or 1; NaN stays
FASTDG_LIFT(absolute)
FASTDG_LIFT(reaches)             // 1 where x >= threshold, else 0
FASTDG_LIFT(positive)            // 0 where x <= 0, -0 too, else x
FASTDG_LIFT(or_else)             // x where it is a number, else the other
FASTDG_LIFT(hyperbolic_tangent)
#undef FASTDG_LIFT

template <class Op>
FASTDG_ANYWHERE int parts(const Op&) { return 1; }

template <class Op, class F>
FASTDG_DEVICE void with_part(const Op& op, int, const F& f) { f(op); }

template <class Pass, class Value>
struct State {};

// An operator and the domains that take part: how many, and which one is the first.
template <class Op>
struct Present {
  static constexpr int SUMS = Op::SUMS;
  Op op;
  float count;
  int first;
};

template <class Op, class F>
FASTDG_DEVICE Present<Op> present_of(const Op& op, int domains, const F& here) {
  Present<Op> out{op, 0, 0};
  for (int d = domains - 1; d >= 0; --d)
    if (here(d)) out.count += 1, out.first = d;
  return out;
}

// Sums of `count` values and their squares, as offsets from the first value: the offsets lose few digits,
// and are 0 if all values are equal.
template <class Value>
struct Spread {
  Value first{}, offset{}, squares{};

  FASTDG_DEVICE void begin(const Value& x) { first = x, offset = squares = x - x; }  // 0, or not a number
  FASTDG_DEVICE void add(const Value& x) {
    const Value to = x - first;
    offset += to;
    squares += to * to;
  }
  FASTDG_DEVICE Value mean(float count) const { return first + 1 / count * offset; }
  // Infinite squares of finite offsets are infinite, whether a difference of infinities is one here or not
  FASTDG_DEVICE Value around_mean(float count) const {
    return or_else(positive(squares - 1 / count * offset * offset), INFINITY) + 0 * offset;
  }
};

template <class Pass>
FASTDG_DEVICE int rows_of(const Pass&) { return 0; }

template <class Pass, class Columns, class Value>
FASTDG_DEVICE void add(const Pass&, const Columns&, int, State<Pass, Value>&) {}

template <class Op>
FASTDG_DEVICE int place_of(const Op&, int sum) { return sum; }

// -- gram: a pass for each tile of the upper triangle of the products --

template <int WIDTH, bool DIAGONAL>
struct GramTile {
  static constexpr int SUMS = DIAGONAL ? WIDTH * (WIDTH + 1) / 2 : TILE * WIDTH;
  int row, column, domains;
};

inline FASTDG_ANYWHERE int parts(const Gram& op) {
  const int tiles = (op.domains + TILE - 1) / TILE;
  return tiles * (tiles + 1) / 2;
}

template <int WIDTH, class F>
FASTDG_DEVICE void with_width(const Gram& op, int row, int column, const F& f) {
  if (op.domains - column < WIDTH) {
    if constexpr (WIDTH > 1) with_width<WIDTH - 1>(op, row, column, f);
  } else if (row == column) {
    f(GramTile<WIDTH, true>{row, column, op.domains});
  } else {
    f(GramTile<WIDTH, false>{row, column, op.domains});
  }
}

template <class F>
FASTDG_DEVICE void with_part(const Gram& op, int part, const F& f) {
  int column = 0;
  while (part > column) part -= ++column;
  with_width<TILE>(op, part * TILE, column * TILE, f);
}

template <int WIDTH, bool DIAGONAL>
FASTDG_DEVICE int place_of(const GramTile<WIDTH, DIAGONAL>& tile, int sum) {
  int row = 0;
  for (int left; sum >= (left = DIAGONAL ? WIDTH - row : WIDTH); ++row) sum -= left;
  return (tile.row + row) * tile.domains + tile.column + (DIAGONAL ? row : 0) + sum;
}

template <int WIDTH, bool DIAGONAL, class Columns, class Value, class Sum>
FASTDG_DEVICE void finish(const GramTile<WIDTH, DIAGONAL>& tile, const Columns& x,
                          State<GramTile<WIDTH, DIAGONAL>, Value>&, Sum* sums) {
  Value right[WIDTH];
  FASTDG_UNROLL for (int n = 0; n < WIDTH; ++n) right[n] = x.from(tile.column + n);
  int sum = 0;
  FASTDG_UNROLL for (int m = 0; m < (DIAGONAL ? WIDTH : TILE); ++m) {
    const Value left = DIAGONAL ? right[m] : x.from(tile.row + m);
    FASTDG_UNROLL for (int n = DIAGONAL ? m : 0; n < WIDTH; ++n) sums[sum++] += left * right[n];
  }
}

// -- combine: sum_d w_d g_d, into the row after the domains' --

template <class Value>
struct State<Combine, Value> {
  Value total{};
};

FASTDG_DEVICE int rows_of(const Combine& op) { return op.domains; }

template <class Columns, class Value>
FASTDG_DEVICE void add(const Combine& op, const Columns& x, int d, State<Combine, Value>& state) {
  state.total += op.weights[d] * x.from(d);
}

template <class Columns, class Value, class Sum>
FASTDG_DEVICE void finish(const Combine& op, const Columns& x, State<Combine, Value>& state, Sum*) {
  x.to(op.domains, state.total);
}

// -- agreement: that times a mask, and sums of the mask and of the absolute values --

constexpr float UNDEFINED = 1e-17f;  // DomainBed's value for a variance or a mask of NaN

// The least number n with n / count >= threshold, as rounded.
FASTDG_DEVICE float least_of(float threshold, float count) {
  const float n = ceilf(threshold * count);  // within 1 of it
  return (n - 1) / count >= threshold ? n - 1 : n / count >= threshold ? n : n + 1;
}

template <bool SOFT, class F>
FASTDG_DEVICE void with_part(const Agreement<SOFT>& op, int, const F& f) {
  auto present = present_of(op, op.domains, [&](int d) { return op.weights[d] != 0; });
  if (!SOFT) present.op.threshold = least_of(op.threshold, present.count);
  if (present.count == 0) present.op.threshold = INFINITY;
  f(present);
}

template <class Value>
struct State<Present<Agreement<false>>, Value> {
  Value total{};
  Value balance{};  // positive less negative ones
};

template <class Value>
struct State<Present<Agreement<true>>, Value> : State<Present<Agreement<false>>, Value> {
  Spread<Value> spread;
};

template <bool SOFT>
FASTDG_DEVICE int rows_of(const Present<Agreement<SOFT>>& pass) { return pass.op.domains; }

template <bool SOFT, class Columns, class Value>
FASTDG_DEVICE void add(const Present<Agreement<SOFT>>& pass, const Columns& x, int d,
                       State<Present<Agreement<SOFT>>, Value>& state) {
  const float weight = pass.op.weights[d];
  if (weight == 0) return;
  const Value g = x.from(d);
  state.total += weight * g;
  state.balance += sign(g);
  if constexpr (SOFT) d == pass.first ? state.spread.begin(g) : state.spread.add(g);
}

template <bool SOFT, class Columns, class Value, class Sum>
FASTDG_DEVICE void finish(const Present<Agreement<SOFT>>& pass, const Columns& x,
                          State<Present<Agreement<SOFT>>, Value>& state, Sum* sums) {
  const Value common = absolute(state.balance);
  Value mask{};
  if constexpr (SOFT) {
    const Value variance = 1 / (pass.count - 1) * state.spread.around_mean(pass.count);
    const Value height = pass.op.steepness / or_else(variance, UNDEFINED) *
                         (common / pass.count - pass.op.threshold);
    if (pass.count > 0) mask = or_else(positive(hyperbolic_tangent(height)), UNDEFINED);
  } else {
    mask = reaches(common, pass.op.threshold);
  }
  const Value out = mask * state.total;
  sums[0] += mask;
  sums[1] += absolute(out);
  x.to(pass.op.domains, out);
}

// -- meta_step: row 0 after the inner steps and row 1 before them, both overwritten; their distance --

template <class Columns, class Value, class Sum>
FASTDG_DEVICE void finish(const MetaStep& op, const Columns& x, State<MetaStep, Value>&, Sum* sums) {
  const Value end = x.from(0), start = x.from(1), delta = end - start;
  sums[0] += delta * delta;
  // Exact at both ends.
  const Value out = op.rate < 0.5f ? start + op.rate * delta : end - (1 - op.rate) * delta;
  x.to(0, out);
  x.to(1, out);
}

// -- variance_gap: sum_d (u_d - mean u)^2 over the domains present, u = variance + history * ema --

template <class Columns>
FASTDG_DEVICE auto gap_row(const Gap& op, const Columns& x, int d) {
  auto u = x.from(d);
  if (op.kept) u += op.history * x.from(op.domains + d);
  return u;
}

template <std::derived_from<Gap> Op, class F>
FASTDG_DEVICE void with_part(const Op& op, int, const F& f) {
  f(present_of(op, op.domains, [&](int d) { return op.present[d]; }));
}

template <std::derived_from<Gap> Op, class Value>
struct State<Present<Op>, Value> : Spread<Value> {};

template <std::derived_from<Gap> Op>
FASTDG_DEVICE int rows_of(const Present<Op>& pass) { return pass.op.domains; }

template <std::derived_from<Gap> Op, class Columns, class Value>
FASTDG_DEVICE void add(const Present<Op>& pass, const Columns& x, int d, State<Present<Op>, Value>& state) {
  if (!pass.op.present[d]) return;
  const Value u = gap_row(pass.op, x, d);
  d == pass.first ? state.begin(u) : state.add(u);
}

template <class Columns, class Value, class Sum>
FASTDG_DEVICE void finish(const Present<Gap>& pass, const Columns&, State<Present<Gap>, Value>& state,
                          Sum* sums) {
  if (pass.count > 0) sums[0] += state.around_mean(pass.count);
}

// Its derivative, a row for each domain; 0 for an absent domain.
template <class Columns, class Value, class Sum>
FASTDG_DEVICE void finish(const Present<GapGradient>& pass, const Columns& x,
                          State<Present<GapGradient>, Value>& state, Sum*) {
  const GapGradient& op = pass.op;
  const float scale = 2 * *op.grad;
  const Value mean = state.mean(pass.count);
  const int first = (op.kept ? 2 : 1) * op.domains;
  for (int d = 0; d < op.domains; ++d)
    x.to(first + d, op.present[d] ? scale * (gap_row(op, x, d) - mean) : Value{});
}
