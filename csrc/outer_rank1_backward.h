// Derivative of the moments for T = 1, as four matrix products over the samples of a domain:
//   grad right = right * (left^2 slope) + left level,   grad left = left * (right^2 slope^T) + right level^T.
// Of the left gradient lanes run over the samples, so that slope and level are read as they lie, each element
// once; of the right one, over its width, so that it is written as it lies.
// Included once per instruction set, inside its namespace, after outer_backward.h.

struct Rank1Right {  // a register tile of the right gradient
  const float *const *left, *const *left_squared;  // [depth] of each sample
  int64_t depth;
  const float *slope, *level;  // [depth][stride]
  int64_t stride;
  const float* const* right;
  float* const* out;
  bool add;
};

template <int M, int V>
struct Rank1RightTile {
  static void run(const Rank1Right& t) {
    vec slope[M][V] = {}, level[M][V] = {};
    for (int64_t k = 0; k < t.depth; ++k) {
      vec a[V], b[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        a[v] = load(t.slope + k * t.stride + v * W);
        b[v] = load(t.level + k * t.stride + v * W);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float x = t.left[m][k], square = t.left_squared[m][k];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          slope[m][v] += square * a[v];
          level[m][v] += x * b[v];
        }
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* to = t.out[m] + v * W;
        const vec x = load(t.right[m] + v * W) * slope[m][v] + level[m][v];
        store(to, t.add ? load(to) + x : x);
      }
  }
};

class Rank1Backward {
  static constexpr int TILE = ROWS / 2;  // samples of a Rank1RightTile, which has two sums of each

 public:
  Rank1Backward(const Outer& p, const Upstream& up, const Gradient& grad, Group group, Range columns)
      : p_(p), up_(up), grad_(grad), group_(group), columns_(columns), rows_(p.left_width()),
        panels_((group.count + R - 1) / R) {
    wide_ = std::min<int64_t>(RANK1_COLUMNS, columns.end - columns.begin);
    high_ = (rows_ + (rows_ - 1) / RANK1_ROWS) / ((rows_ - 1) / RANK1_ROWS + 1);  // blocks of one height
    high_ = std::min(rows_, (high_ + ROWS - 1) / ROWS * ROWS);
    stride_ = (wide_ + R - 1) / R * R;
    const int64_t left = panels_ * rows_ * R, right = panels_ * wide_ * R;
    const int64_t factors = padded(group.count * rows_);
    ScratchAllocator allocator(3 * left + 2 * right + 2 * factors + 2 * padded(high_ * stride_) +
                               padded(2 * wide_) * 2);
    left_ = allocator.take(left);
    by_slope_ = allocator.take(left);
    by_level_ = allocator.take(left);
    right_ = allocator.take(right);
    right_squared_ = allocator.take(right);
    factor_ = allocator.take(factors);
    factor_squared_ = allocator.take(factors);
    slope_ = allocator.take(high_ * stride_);
    level_ = allocator.take(high_ * stride_);
    along_ = reinterpret_cast<int64_t*>(allocator.take(2 * wide_));
    right_col_ = reinterpret_cast<int64_t*>(allocator.take(2 * wide_));
    for (int64_t k = 0; k < wide_; ++k) along_[k] = k;
    for (int64_t k = 0; k < wide_; ++k) right_col_[k] = k * p.right.col;
  }

  void run() {
    gather_lanes(left_, nullptr, rows_, p_.left.data, p_.left.sample, p_.left.col.data());
    for (int64_t s = 0; s < group_.count; ++s) {
      const float* from = p_.left.data + group_.samples[s] * p_.left.sample;
      for (int64_t k = 0; k < rows_; ++k) {
        const float x = from[p_.left.col[k]];
        factor_[s * rows_ + k] = x;
        factor_squared_[s * rows_ + k] = x * x;
      }
    }
    for (int64_t c = columns_.begin; c < columns_.end; c += wide_) {
      const int64_t width = std::min(wide_, columns_.end - c);
      gather_lanes(right_, right_squared_, width, p_.right.data + c * p_.right.col, p_.right.sample,
                   right_col_);
      for (int64_t r = 0; r < rows_; r += high_) {
        const int64_t height = std::min(high_, rows_ - r);
        load_upstream(r, height, c, width);
        for (int64_t j = 0; j < panels_; ++j) left_products(j, r, height, width, c > columns_.begin);
        for (int64_t v = 0; v < width; v += R)
          for (int64_t s = 0; s < group_.count; s += TILE)
            right_tile(s, r, height, c + v, v, std::min<int64_t>(R, width - v));
      }
    }
    combine();
  }

 private:
  // value[panel][width][R], lanes being samples, and unless null their squares
  void gather_lanes(float* values, float* squares, int64_t width, const float* data, int64_t sample,
                    const int64_t* col) {
    const int64_t whole = width > 1 && col[1] - col[0] == 1 ? width / W * W : 0;
    for (int64_t j = 0; j < panels_; ++j)
      for (int64_t v = 0; v < R; v += W) {
        const float* from[W];
        // Lanes without a sample are computed along and dropped, whatever they hold
        const int64_t first = j * R + v, there = std::min<int64_t>(W, group_.count - first);
        float* value = values + j * width * R + v;
        int64_t k = 0;
        if (there > 0) {
          for (int64_t l = 0; l < W; ++l)
            from[l] = data + group_.samples[first + std::min(l, there - 1)] * sample;
          if (whole > 0)
            for (; k < whole; k += W) {
              const float* block[W];
              for (int l = 0; l < W; ++l) block[l] = from[l] + col[k];
              transpose(value + k * R, R, block);
            }
        }
        for (; k < width; ++k)
          for (int64_t l = 0; l < W; ++l) value[k * R + l] = l < there ? from[l][col[k]] : 0.f;
      }
    for (int64_t k = 0; squares != nullptr && k < panels_ * width * R; k += W) {
      const vec x = load(values + k);
      store(squares + k, x * x);
    }
  }

  void load_upstream(int64_t r, int64_t height, int64_t c, int64_t width) {
    const float n = static_cast<float>(up_.count);
    for (int64_t k = 0; k < height; ++k) {
      const int64_t at = p_.out(r + k, c);
      const float *variance = up_.grad_variance + at, *mean = up_.mean + at;
      float *slope = slope_ + k * stride_, *level = level_ + k * stride_;
      for (int64_t i = 0; i < width; ++i) {
        slope[i] = variance[i] * (2 / n);
        level[i] = -slope[i] * mean[i];
      }
      if (up_.grad_mean == nullptr) continue;
      for (int64_t i = 0; i < width; ++i) level[i] += up_.grad_mean[at + i] / n;
    }
  }

  void left_products(int64_t j, int64_t r, int64_t height, int64_t width, bool add) {
    const int64_t vectors = group_.count - j * R > W ? 2 : 1;
    const int64_t left = (j * rows_ + r) * R, right = j * width * R;
    const auto tiles = [&](const float* matrix, const float* panel, float* out) {
      for (int64_t m = 0; m < height; m += ROWS) {
        const int64_t tile = std::min<int64_t>(ROWS, height - m);
        const float* rows[ROWS];
        for (int64_t k = 0; k < tile; ++k) rows[k] = matrix + (m + k) * stride_;
        tile_routine<ProductRows>(tile, vectors)(rows, along_, width, panel, out + m * R, R, add);
      }
    };
    tiles(slope_, right_squared_ + right, by_slope_ + left);
    tiles(level_, right_ + right, by_level_ + left);
  }

  // Of the samples from `s` on and `width` <= R columns, which begin at `column` and in the block at `at`.
  void right_tile(int64_t s, int64_t r, int64_t height, int64_t column, int64_t at, int64_t width) {
    static constexpr auto one = row_table<Rank1RightTile, 1>(std::make_index_sequence<TILE>());
    static constexpr auto two = row_table<Rank1RightTile, 2>(std::make_index_sequence<TILE>());
    const int64_t samples = std::min<int64_t>(TILE, group_.count - s);
    const bool direct = width % W == 0 && p_.right.col == 1;
    alignas(64) float beside[2][TILE * R];  // where vectors do not fit
    const float *left[TILE], *squared[TILE], *right[TILE];
    float *to[TILE], *out[TILE];
    for (int64_t m = 0; m < samples; ++m) {
      const int64_t n = group_.samples[s + m], factor = (s + m) * rows_ + r;
      left[m] = factor_ + factor;
      squared[m] = factor_squared_ + factor;
      right[m] = p_.right.data + n * p_.right.sample + column * p_.right.col;
      to[m] = out[m] = grad_.right + n * p_.right.width + column;
      if (direct) continue;
      for (int64_t k = 0; k < R; ++k) beside[0][m * R + k] = k < width ? right[m][k * p_.right.col] : 0.f;
      right[m] = beside[0] + m * R;
      out[m] = beside[1] + m * R;
    }
    const Rank1Right tile{left,  squared, height, slope_ + at, level_ + at,
                          stride_, right,   out,    r > 0 && direct};
    (width > W ? two : one)[samples - 1](tile);
    for (int64_t m = 0; !direct && m < samples; ++m)
      for (int64_t k = 0; k < width; ++k) to[m][k] = out[m][k] + (r > 0 ? to[m][k] : 0.f);
  }

  void combine() {
    for (int64_t s = 0; s < group_.count; ++s) {
      float* out = grad_.left + group_.samples[s] * grad_.left_sample;
      const int64_t at = s / R * rows_ * R + s % R;
      for (int64_t k = 0; k < rows_; ++k)
        out[k] = left_[at + k * R] * by_slope_[at + k * R] + by_level_[at + k * R];
    }
  }

  const Outer& p_;
  const Upstream& up_;
  const Gradient& grad_;
  const Group group_;
  const Range columns_;
  const int64_t rows_, panels_;
  int64_t wide_, high_, stride_;  // of a block of slope and level
  float *left_, *by_slope_, *by_level_, *right_, *right_squared_;  // lanes being samples
  float *factor_, *factor_squared_;                                // [sample][rows] of the left factor
  float *slope_, *level_;
  int64_t *along_, *right_col_;
};

static void backward_rank1(const Outer& p, const Upstream& up, const Gradient& grad, Group group,
                           Range columns) {
  for (int64_t s = 0; s < group.count; s += RANK1_SAMPLES) {
    const Group part{group.samples + s, std::min(RANK1_SAMPLES, group.count - s)};
    Rank1Backward(p, up, grad, part, columns).run();
  }
}
