// Derivative of the moments. Included once per instruction set, inside its namespace.
//
// With H = slope * g + level, the derivative of the loss by a sample's gradient g, where
// slope = 2 grad_variance / n and level = grad_mean / n - slope * mean:
//   grad right[t] = sum_m left[t, m] H[m],   grad left[t, m] = <H[m], right[t]>.
// g is formed again, a block of rows at a time, and H stays in the second-level cache.

template <int M, int V>
struct UpstreamTile {  // H = slope * g + level
  static void run(const float* left, const int64_t* col, const int64_t* row, int64_t depth,
                  const float* panel, const float* slope, const float* level, float* h) {
    vec acc[M][V] = {};
    const float* p[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) p[m] = left + col[m];
    multiply(acc, p, row, depth, panel);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const int64_t at = m * R + v * W;
        store(h + at, load(slope + at) * acc[m][v] + load(level + at));
      }
  }
};

template <int M, int V>
struct ProductRows {  // out[m] (+)= sum_k left[m][step[k]] * panel[k]
  static void run(const float* const* left, const int64_t* step, int64_t depth, const float* panel,
                  float* out, int64_t stride, bool add) {
    vec acc[M][V] = {};
    const float* p[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) p[m] = left[m];
    multiply(acc, p, step, depth, panel);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* to = out + m * stride + v * W;
        store(to, add ? load(to) + acc[m][v] : acc[m][v]);
      }
  }
};

// out rows are `width` floats wide, which need not fill the vectors.
static void product_rows(const float* const* left, int64_t height, const int64_t* step, int64_t depth,
                         const float* panel, float* out, int64_t stride, int64_t width, bool add) {
  const auto run = tile_routine<ProductRows>(height, width > W ? 2 : 1);
  if (width % W == 0) return run(left, step, depth, panel, out, stride, add);
  alignas(64) float whole[ROWS * R];
  run(left, step, depth, panel, whole, R, false);
  for (int64_t m = 0; m < height; ++m)
    for (int64_t v = 0; v < width; ++v)
      out[m * stride + v] = whole[m * R + v] + (add ? out[m * stride + v] : 0.f);
}

// sums[m][t] = <h[m], right[t]> for 3 rows and T <= 4 positions, lanes along the width: nothing is wasted
// however few positions there are.
constexpr int DOT_ROWS = 3, DOT_POSITIONS = 4;

template <int T>
struct DotTile {
  static void run(const float* const* h, int64_t h_panel, const float* right, int64_t right_panel,
                  int64_t panels, float* const* sums) {
    vec acc[DOT_ROWS][DOT_POSITIONS] = {};
    for (int64_t j = 0; j < panels; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < R; v += W) {
        vec x[DOT_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < DOT_ROWS; ++m) x[m] = load(h[m] + j * h_panel + v);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const vec y = load(right + j * right_panel + t * R + v);
#pragma GCC unroll 4
          for (int m = 0; m < DOT_ROWS; ++m) acc[m][t] += x[m] * y;
        }
      }
    for (int m = 0; m < DOT_ROWS; ++m) {
      exchange<1>(acc[m][0], acc[m][1], std::make_index_sequence<W>());
      exchange<1>(acc[m][2], acc[m][3], std::make_index_sequence<W>());
      vec one = acc[m][0] + acc[m][1], two = acc[m][2] + acc[m][3];
      exchange<2>(one, two, std::make_index_sequence<W>());
      const vec total = one + two;  // lane l holds a part of the sum for t = l % 4
      for (int t = 0; t < T; ++t) {
        float sum = total[t];
        for (int l = t + 4; l < W; l += 4) sum += total[l];
        sums[m][t] = sum;
      }
    }
  }
};

static void dot_positions(const float* h, int64_t h_panel, int64_t rows, const float* right,
                          int64_t right_panel, int64_t panels, int64_t positions, float* out) {
  static constexpr std::array run{&DotTile<1>::run, &DotTile<2>::run, &DotTile<3>::run,
                                  &DotTile<4>::run};
  for (int64_t m = 0; m < rows; m += DOT_ROWS)
    for (int64_t t = 0; t < positions; t += DOT_POSITIONS) {
      const float* x[DOT_ROWS];
      float* sums[DOT_ROWS];
      for (int64_t k = 0; k < DOT_ROWS; ++k) {
        const int64_t at = std::min(m + k, rows - 1);  // the last rows may be computed twice
        x[k] = h + at * R;
        sums[k] = out + at * R + t;
      }
      run[std::min<int64_t>(DOT_POSITIONS, positions - t) - 1](x, h_panel, right + t * R, right_panel,
                                                              panels, sums);
    }
}

static void add_run(float* to, const float* from, int64_t length) {
  typedef float four __attribute__((vector_size(16)));
  typedef float loose_four __attribute__((vector_size(16), aligned(4), may_alias));
  int64_t k = 0;
  for (; k + W <= length; k += W) store(to + k, load(to + k) + load(from + k));
  for (; k + 4 <= length; k += 4) {
    const four sum = *reinterpret_cast<const loose_four*>(to + k) +
                     *reinterpret_cast<const loose_four*>(from + k);
    *reinterpret_cast<loose_four*>(to + k) = sum;
  }
  for (; k < length; ++k) to[k] += from[k];
}

// Taps of the commonest kernel, of 3 x 3: rows that far apart belong to different channels.
constexpr int64_t TAPS = 9;

// Adds out[m][t] to the place of element (t, m), neighbours in t together where they are neighbours there. Not
// row after row: neighbouring taps overlap, and the second would wait for the first to reach the cache.
static void scatter(float* to, const int64_t* row, int64_t positions, const int64_t* col,
                    int64_t rows, const float* out) {
  for (int64_t t = 0; t < positions;) {
    int64_t length = 1;
    while (t + length < positions && row[t + length] == row[t] + length) ++length;
    const int64_t step = length > 1 ? TAPS : 1;
    for (int64_t tap = 0; tap < step; ++tap)
      for (int64_t m = tap; m < rows; m += step) add_run(to + row[t] + col[m], out + m * R + t, length);
    t += length;
  }
}

class Backward {
 public:
  Backward(const Outer& p, const Upstream& up, const Gradient& grad)
      : p_(p), up_(up), grad_(grad), T_(p.positions), V_(p.right.width), panels_((V_ + R - 1) / R),
        position_panels_((T_ + R - 1) / R) {
    const int64_t lanes = panels_ * R;
    block_ = std::min(p.left_width(),
                      std::clamp<int64_t>(UPSTREAM_FLOATS / lanes, ROWS, UPSTREAM_ROWS) / ROWS * ROWS);
    // Lanes along the positions, or along the width with sums at the end: whichever idles less.
    const int64_t filled = (T_ + W - 1) / W * W;
    dots_ = T_ * (lanes + 6 * W) < filled * lanes;
    const int64_t panel_floats = panels_ * T_ * R, position_floats = position_panels_ * V_ * R;
    ScratchAllocator allocator(panel_floats + position_floats + 3 * block_ * lanes + 2 * block_ * R +
                               padded(2 * V_));
    right_ = allocator.take(panel_floats);
    turned_ = allocator.take(position_floats);
    slope_ = allocator.take(block_ * lanes);
    level_ = allocator.take(block_ * lanes);
    h_ = allocator.take(block_ * lanes);
    out_ = allocator.take(block_ * R);
    spare_ = allocator.take(block_ * R);
    h_step_ = reinterpret_cast<int64_t*>(allocator.take(2 * V_));
  }

  void run(Group group) {
    for (int64_t begin = 0; begin < p_.left_width(); begin += block_) {
      begin_ = begin;
      rows_ = std::min(block_, p_.left_width() - begin);
      for (int64_t v = 0; v < V_; ++v) h_step_[v] = v / R * rows_ * R + v % R;
      load_upstream();
      for (int64_t k = 0; k < group.count; ++k) sample(group.samples[k]);
    }
  }

 private:
  void load_upstream() {
    const float n = static_cast<float>(up_.count);
    for (int64_t j = 0; j < panels_; ++j) {
      const int width = static_cast<int>(std::min<int64_t>(R, V_ - j * R));
      const int64_t at = p_.out(begin_, j * R);
      float *slope = slope_ + j * rows_ * R, *level = level_ + j * rows_ * R;
      pack(slope, up_.grad_variance + at, p_.out_left, p_.out_right, rows_, width);
      pack(level, up_.mean + at, p_.out_left, p_.out_right, rows_, width);
      for (int64_t k = 0; k < rows_ * R; k += W) {
        const vec s = load(slope + k) * (2 / n);
        store(slope + k, s);
        store(level + k, -s * load(level + k));
      }
      if (up_.grad_mean == nullptr) continue;
      pack(spare_, up_.grad_mean + at, p_.out_left, p_.out_right, rows_, width);
      for (int64_t k = 0; k < rows_ * R; k += W)
        store(level + k, load(level + k) + load(spare_ + k) / n);
    }
  }

  void sample(int64_t n) {
    const float* right = p_.right.data + n * p_.right.sample;
    const float* left = p_.left.data + n * p_.left.sample;
    for (int64_t j = 0; j < panels_; ++j) {
      const int width = static_cast<int>(std::min<int64_t>(R, V_ - j * R));
      float* panel = right_ + j * T_ * R;
      pack(panel, right + j * R * p_.right.col, p_.right.row, p_.right.col, T_, width);
      for (int64_t m = 0; m < rows_; m += ROWS) {
        const int64_t at = (j * rows_ + m) * R;
        tile_routine<UpstreamTile>(std::min<int64_t>(ROWS, rows_ - m), 2)(
            left, p_.left.col.data() + begin_ + m, p_.left.row.data(), T_, panel, slope_ + at,
            level_ + at, h_ + at);
      }
      if (grad_.right != nullptr) right_gradient(n, left, j, width);
    }
    if (grad_.left != nullptr) left_gradient(n, right);
  }

  void right_gradient(int64_t n, const float* left, int64_t j, int width) {
    float* to = grad_.right + n * T_ * V_ + j * R;
    for (int64_t t = 0; t < T_; t += ROWS) {
      const int64_t height = std::min<int64_t>(ROWS, T_ - t);
      const float* rows[ROWS];
      for (int64_t k = 0; k < height; ++k) rows[k] = left + p_.left.row[t + k];
      product_rows(rows, height, p_.left.col.data() + begin_, rows_, h_ + j * rows_ * R, to + t * V_,
                   V_, width, begin_ > 0);
    }
  }

  void left_gradient(int64_t n, const float* right) {
    float* to = grad_.left + n * grad_.left_sample;
    if (grad_.overlaps && begin_ == 0) std::memset(to, 0, sizeof(float) * grad_.left_sample);
    for (int64_t s = 0; s < position_panels_; ++s) {
      const int width = static_cast<int>(std::min<int64_t>(R, T_ - s * R));
      if (dots_) {
        dot_positions(h_, rows_ * R, rows_, right_ + s * R * R, T_ * R, panels_, width, out_);
      } else {
        float* panel = turned_ + s * V_ * R;
        pack(panel, right + s * R * p_.right.row, p_.right.col, p_.right.row, V_, width);
        const auto step = h_step_;
        for (int64_t m = 0; m < rows_; m += ROWS) {
          const int64_t height = std::min<int64_t>(ROWS, rows_ - m);
          const float* rows[ROWS];
          for (int64_t k = 0; k < height; ++k) rows[k] = h_ + (m + k) * R;
          tile_routine<ProductRows>(height, width > W ? 2 : 1)(rows, step, V_, panel, out_ + m * R, R,
                                                              false);
        }
      }
      const int64_t* row = grad_.row.data() + s * R;
      const int64_t* col = grad_.col.data() + begin_;
      if (grad_.overlaps)
        scatter(to, row, width, col, rows_, out_);
      else
        unpack(to + row[0] + col[0], 1, p_.left_width(), out_, rows_, width);
    }
  }

  const Outer& p_;
  const Upstream& up_;
  const Gradient& grad_;
  int64_t T_, V_, panels_, position_panels_, block_, begin_ = 0, rows_ = 0;
  bool dots_;
  // Of a sample: right [panel][T][R] and turned [position panel][V][R]. Of the block of rows: slope, level
  // and H, each [panel][rows][R]; out [rows][R] for one panel of positions.
  float *right_, *turned_, *slope_, *level_, *h_, *out_, *spare_;
  int64_t* h_step_;
};

static void backward(const Outer& p, const Upstream& up, const Gradient& grad, Group group) {
  Backward(p, up, grad).run(group);
}
