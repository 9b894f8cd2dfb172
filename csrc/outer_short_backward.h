// Derivative of the moments for few positions, T <= 8. With H = slope * g + level as in outer_backward.h,
// g is formed again in registers, and both products with H are made there:
//   grad right[t] = sum_m left[t, m] H[m],   grad left[t, m] = <H[m], right[t]>.
// Lanes run along the output's rows, so that slope and level are read as they lie, each element once.
// Included once per instruction set, inside its namespace.

struct ShortGradient {       // of one sample, by some rows of the output
  const float *left, *slope, *level, *right;  // [T][left_step], [rows][step] each, [T][right_step]
  float *of_left, *of_right;                  // as left, which is added to, and [T][to_step]
  int64_t left_step, step, right_step, to_step, width;
  bool first;                                 // whether of_right is written, not added to
};

template <int T, int M>
struct ShortGradientTile {
  static void run(const ShortGradient& t) {
    vec left[M][T], sum[M][T] = {};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int k = 0; k < T; ++k) left[m][k] = vec{} + t.left[k * t.left_step + m];
    // Copies, which stores cannot change
    const float *slope = t.slope, *level = t.level, *from = t.right;
    float* to = t.of_right;
    const int64_t step = t.step, right_step = t.right_step, to_step = t.to_step;
    const bool first = t.first;
    for (const float* end = from + t.width; from < end; from += W, to += W, slope += W, level += W) {
      vec right[T], h[M];
#pragma GCC unroll 8
      for (int k = 0; k < T; ++k) right[k] = load(from + k * right_step);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        vec g = left[m][0] * right[0];
#pragma GCC unroll 8
        for (int k = 1; k < T; ++k) g += left[m][k] * right[k];
        h[m] = load(slope + m * step) * g + load(level + m * step);
      }
#pragma GCC unroll 8
      for (int k = 0; k < T; ++k) {
        vec out = first ? vec{} : load(to + k * to_step);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) out += left[m][k] * h[m];
        store(to + k * to_step, out);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int k = 0; k < T; ++k) sum[m][k] += h[m] * right[k];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int k = 0; k < T; ++k) t.of_left[k * t.left_step + m] += add_lanes(sum[m][k]);
  }
};

// Rows of a tile whose left factor and sums fit the registers together.
constexpr int short_rows(int T) { return std::max(1, (W == 16 ? 8 : 4) / T); }

// Tiles of 1 .. short_rows(T) rows; those after them are never taken.
template <int T, size_t... M>
static constexpr auto short_gradient_rows(std::index_sequence<M...>) {
  return std::array{&ShortGradientTile<T, std::min(static_cast<int>(M) + 1, short_rows(T))>::run...};
}

template <size_t... T>
static constexpr auto short_gradient_table(std::index_sequence<T...>) {
  return std::array{
      short_gradient_rows<static_cast<int>(T) + 1>(std::make_index_sequence<short_rows(1)>())...};
}

constexpr int64_t DIRECT_TILES = 2;

class ShortBackward {
 public:
  ShortBackward(const Outer& p, const Upstream& up, const Gradient& grad, Group group, Range columns)
      : p_(p), up_(up), grad_(grad), group_(group), columns_(columns), T_(p.positions), rows_(p.left_width()) {
    const int64_t width = columns.end - columns.begin;
    wide_ = pieces(pieces(width, pieces(width, SHORT_COLUMNS)), W) * W;
    step_ = wide_ + W;  // rows do not meet in one cache set
    high_ = std::min(rows_, SHORT_UPSTREAM_ROWS);
    // Samples whose right factor and gradient stay in the first-level cache over the rows of a block
    together_ = std::max<int64_t>(1, SHORT_FLOATS / (2 * T_ * wide_));
    const int64_t left = group.count * T_ * rows_, right = group.count * T_ * step_;
    ScratchAllocator allocator(2 * padded(left) + 2 * right + 2 * high_ * step_);
    left_ = allocator.take(left);
    of_left_ = allocator.take(left);
    right_ = allocator.take(right);
    of_right_ = allocator.take(right);
    slope_ = allocator.take(high_ * step_);
    level_ = allocator.take(high_ * step_);
  }

  void run() {
    each_row([&](int64_t n, int64_t t, int64_t at) {
      const float* from = p_.left.data + n * p_.left.sample + p_.left.row[t];
      for (int64_t m = 0; m < rows_; ++m) left_[at * rows_ + m] = from[p_.left.col[m]];
    });
    std::fill_n(of_left_, group_.count * T_ * rows_, 0.f);
    for (int64_t c = columns_.begin; c < columns_.end; c += wide_) block(c, std::min(wide_, columns_.end - c));
    each_row([&](int64_t n, int64_t t, int64_t at) {
      float* to = grad_.left + n * grad_.left_sample + t * rows_;
      std::copy_n(of_left_ + at * rows_, rows_, to);
    });
  }

 private:
  template <class Visit>
  void each_row(const Visit& visit) {
    for (int64_t k = 0; k < group_.count; ++k)
      for (int64_t t = 0; t < T_; ++t) visit(group_.samples[k], t, k * T_ + t);
  }

  void block(int64_t column, int64_t width) {
    static constexpr auto table = short_gradient_table(std::make_index_sequence<SHORT_POSITIONS>());
    const int64_t filled = pieces(width, W) * W;
    // For few rows copies would take as long as the products: the right factor is read where it lies, and its
    // gradient is written there.
    if (rows_ <= DIRECT_TILES * tile_ && p_.right.col == 1 && filled == width) {
      load_upstream(0, rows_, column, width, filled);
      for (int64_t k = 0; k < group_.count; ++k)
        for (int64_t m = 0, tile = 0; m < rows_; m += tile) {
          tile = std::min(tile_, rows_ - m);
          const int64_t n = group_.samples[k], left = k * T_ * rows_ + m, V = p_.right.width;
          table[T_ - 1][tile - 1]({left_ + left, slope_ + m * step_, level_ + m * step_,
                                   p_.right.data + n * p_.right.sample + column, of_left_ + left,
                                   grad_.right + n * T_ * V + column, rows_, step_, p_.right.row, V, width, m == 0});
        }
      return;
    }
    each_row([&](int64_t n, int64_t t, int64_t at) {
      const float* from = p_.right.data + n * p_.right.sample + t * p_.right.row + column * p_.right.col;
      float* to = right_ + at * step_;
      if (p_.right.col == 1)
        std::copy_n(from, width, to);
      else
        for (int64_t c = 0; c < width; ++c) to[c] = from[c * p_.right.col];
      std::fill(to + width, to + filled, 0.f);
    });
    for (int64_t r = 0; r < rows_; r += high_) {
      const int64_t height = std::min(high_, rows_ - r);
      load_upstream(r, height, column, width, filled);
      for (int64_t s = 0; s < group_.count; s += together_)
        for (int64_t m = 0, tile = 0; m < height; m += tile) {
          tile = std::min(tile_, height - m);
          const auto run = table[T_ - 1][tile - 1];
          for (int64_t k = s; k < std::min(group_.count, s + together_); ++k) {
            const int64_t left = k * T_ * rows_ + r + m, right = k * T_ * step_, part = pieces(width, group_.count);
            run({left_ + left, slope_ + m * step_, level_ + m * step_, right_ + right, of_left_ + left,
                 of_right_ + right, rows_, step_, step_, step_, filled, r + m == 0});
            fetch(r + high_ + m, std::min(tile, rows_ - r - high_ - m), column + k * part,
                  std::min(part, width - k * part));
          }
        }
    }
    each_row([&](int64_t n, int64_t t, int64_t at) {
      std::copy_n(of_right_ + at * step_, width, grad_.right + (n * T_ + t) * p_.right.width + column);
    });
  }

  // Asks for a part of the next block while this one is at work. Inlined, as the compiler drops calls of a
  // function that does nothing else.
  inline __attribute__((always_inline)) void fetch(int64_t row, int64_t height, int64_t column, int64_t width) {
    for (int64_t m = 0; m < height; ++m)
      for (int64_t c = 0; c < width; c += 16) {
        const int64_t at = p_.out(row + m, column + c);
        __builtin_prefetch(up_.grad_variance + at, 0, 2);
        __builtin_prefetch(up_.mean + at, 0, 2);
      }
  }

  void load_upstream(int64_t row, int64_t height, int64_t column, int64_t width, int64_t filled) {
    const float n = static_cast<float>(up_.count);
    for (int64_t m = 0; m < height; ++m) {
      const int64_t at = p_.out(row + m, column);
      const float *variance = up_.grad_variance + at, *mean = up_.mean + at;
      float *slope = slope_ + m * step_, *level = level_ + m * step_;
      int64_t c = 0;
      for (; c + W <= width; c += W) {
        const vec s = load(variance + c) * (2 / n);
        store(slope + c, s);
        store(level + c, -s * load(mean + c));
      }
      for (; c < width; ++c) {
        slope[c] = variance[c] * (2 / n);
        level[c] = -slope[c] * mean[c];
      }
      if (up_.grad_mean != nullptr)
        for (c = 0; c < width; ++c) level[c] += up_.grad_mean[at + c] / n;
      std::fill(slope + width, slope + filled, 0.f);
      std::fill(level + width, level + filled, 0.f);
    }
  }

  const Outer& p_;
  const Upstream& up_;
  const Gradient& grad_;
  const Group group_;
  const Range columns_;
  const int64_t T_, rows_;
  const int64_t tile_ = short_rows(static_cast<int>(T_));
  int64_t wide_, step_, high_, together_;
  float *left_, *of_left_;    // [sample][T][rows]
  float *right_, *of_right_;  // [sample][T][step] of a block of columns
  float *slope_, *level_;     // [high][step]
};

static void backward_short(const Outer& p, const Upstream& up, const Gradient& grad, Group group, Range columns) {
  const int64_t most = std::max<int64_t>(1, SHORT_SAMPLES / p.positions);
  for (int64_t s = 0; s < group.count; s += most) {
    const Group part{group.samples + s, std::min(most, group.count - s)};
    ShortBackward(p, up, grad, part, columns).run();
  }
}
