// What the column operators do with the values that the domains have at one place of one parameter.
//
// Included by the CPU launcher inside the namespace of an instruction set, where a Value is a few vectors of
// adjacent columns, and by the CUDA launcher, where it is a few floats: one arithmetic for both. The
// includer defines FASTDG_DEVICE, the qualifiers of a function; FASTDG_UNROLL, before a short loop; TILE,
// rows and columns of a tile of products; and for its Scalars the functions that FASTDG_LIFT lifts.
//
// The tensors of one parameter are its rows. x.from(row) reads the Value of a place, x.to(row, value)
// writes it. An operator makes parts(op) passes over the columns, given one by one by with_part. At a place
// a pass adds its rows_of(pass) rows one after the other to a State, and then finishes; what it adds to its
// SUMS sums goes to the operator's results at place_of(pass, sum).

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
FASTDG_LIFT(sign)                // -1, 0 or 1; what is not a number stays
FASTDG_LIFT(absolute)
FASTDG_LIFT(reaches)             // 1 where x >= threshold, else 0
FASTDG_LIFT(positive)            // 0 where x < 0, else x
FASTDG_LIFT(or_else)             // x where it is a number, else the other
FASTDG_LIFT(hyperbolic_tangent)
#undef FASTDG_LIFT

template <class Op>
FASTDG_ANYWHERE int parts(const Op&) { return 1; }

template <class Op, class F>
FASTDG_DEVICE void with_part(const Op& op, int, const F& f) { f(op); }

template <class Pass, class Value>
struct State {};

// The mean, and the sum of squared distances to it, of values that come one by one.
template <class Value>
struct Spread {
  Value mean{}, squares{};

  FASTDG_DEVICE void add(const Value& x, float count) {
    const Value away = x - mean;
    mean += 1 / count * away;
    squares += away * (x - mean);
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

template <int WIDTH, bool DIAGONAL, class Columns, class Value>
FASTDG_DEVICE void finish(const GramTile<WIDTH, DIAGONAL>& tile, const Columns& x,
                          State<GramTile<WIDTH, DIAGONAL>, Value>&, Value* sums) {
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

template <class Columns, class Value>
FASTDG_DEVICE void finish(const Combine& op, const Columns& x, State<Combine, Value>& state, Value*) {
  x.to(op.domains, state.total);
}

// -- agreement: that times a mask, and sums of the mask and of the absolute values --

constexpr float UNDEFINED = 1e-17f;  // what DomainBed makes of a variance or a mask that is not a number

template <class Value>
struct State<Agreement<false>, Value> {
  Value total{};
  Value balance{};  // positive less negative ones
  float present = 0;
};

template <class Value>
struct State<Agreement<true>, Value> : State<Agreement<false>, Value> {
  Spread<Value> spread;
};

template <bool SOFT>
FASTDG_DEVICE int rows_of(const Agreement<SOFT>& op) { return op.domains; }

template <bool SOFT, class Columns, class Value>
FASTDG_DEVICE void add(const Agreement<SOFT>& op, const Columns& x, int d,
                       State<Agreement<SOFT>, Value>& state) {
  const float weight = op.weights[d];
  if (weight == 0) return;
  const Value g = x.from(d);
  state.total += weight * g;
  state.balance += sign(g);
  state.present += 1;
  if constexpr (SOFT) state.spread.add(g, state.present);
}

template <bool SOFT, class Columns, class Value>
FASTDG_DEVICE void finish(const Agreement<SOFT>& op, const Columns& x,
                          State<Agreement<SOFT>, Value>& state, Value* sums) {
  const Value common = absolute(state.balance) / state.present;
  Value mask{};
  if constexpr (SOFT) {
    const Value variance = or_else(state.spread.squares / (state.present - 1), UNDEFINED);
    const Value height = op.steepness / variance * (common - op.threshold);
    if (state.present > 0) mask = or_else(positive(hyperbolic_tangent(height)), UNDEFINED);
  } else {
    mask = reaches(common, op.threshold);  // with no domain present, 0 / 0 does not
  }
  const Value out = mask * state.total;
  sums[0] += mask;
  sums[1] += absolute(out);
  x.to(op.domains, out);
}

// -- meta_step: row 0 after the inner steps and row 1 before them, both overwritten; their distance --

template <class Columns, class Value>
FASTDG_DEVICE void finish(const MetaStep& op, const Columns& x, State<MetaStep, Value>&, Value* sums) {
  const Value end = x.from(0), start = x.from(1), way = end - start;
  sums[0] += way * way;
  // Exact at both ends.
  const Value out = op.rate < 0.5f ? start + op.rate * way : end - (1 - op.rate) * way;
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

template <class Value>
struct State<Gap, Value> {
  Spread<Value> spread;
  float present = 0;
};

FASTDG_DEVICE int rows_of(const Gap& op) { return op.domains; }

template <class Columns, class Value>
FASTDG_DEVICE void add(const Gap& op, const Columns& x, int d, State<Gap, Value>& state) {
  if (!op.present[d]) return;
  state.present += 1;
  state.spread.add(gap_row(op, x, d), state.present);
}

template <class Columns, class Value>
FASTDG_DEVICE void finish(const Gap&, const Columns&, State<Gap, Value>& state, Value* sums) {
  sums[0] += state.spread.squares;
}

// Its derivative, a row for each domain; 0 for those absent.
template <class Value>
struct State<GapGradient, Value> {
  State<Gap, Value> gap;
};

FASTDG_DEVICE int rows_of(const GapGradient& op) { return op.gap.domains; }

template <class Columns, class Value>
FASTDG_DEVICE void add(const GapGradient& op, const Columns& x, int d, State<GapGradient, Value>& state) {
  add(op.gap, x, d, state.gap);
}

template <class Columns, class Value>
FASTDG_DEVICE void finish(const GapGradient& op, const Columns& x, State<GapGradient, Value>& state,
                          Value*) {
  const float scale = 2 * *op.grad;
  const int first = (op.gap.kept ? 2 : 1) * op.gap.domains;
  for (int d = 0; d < op.gap.domains; ++d)
    x.to(first + d, op.gap.present[d] ? scale * (gap_row(op.gap, x, d) - state.gap.spread.mean) : Value{});
}
