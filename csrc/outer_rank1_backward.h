// Derivative of the moments for T = 1, as four matrix products over the samples of a domain:
//   grad right = right * (left^2 slope) + left level,   grad left = left * (right^2 slope^T) + right level^T.
// Lanes run over the samples, so that slope and level are read as they lie, each element once.
// Included once per instruction set, inside its namespace, after outer_backward.h.

class Rank1Backward {
 public:
  Rank1Backward(const Outer& p, const Upstream& up, const Gradient& grad, Group group, Range columns)
      : p_(p), up_(up), grad_(grad), group_(group), columns_(columns), rows_(p.left_width()),
        panels_((group.count + R - 1) / R) {
    wide_ = std::min<int64_t>(RANK1_COLUMNS, columns.end - columns.begin);
    high_ = std::min<int64_t>(RANK1_ROWS, rows_);
    const int64_t left = panels_ * rows_ * R, right = panels_ * wide_ * R;
    Carver carver(4 * left + 4 * right + 2 * Carver::padded(high_ * wide_) +
                  2 * Carver::padded(2 * wide_) + Carver::padded(2 * high_));
    for (Side* side : {&left_, &right_}) {
      const int64_t size = side == &left_ ? left : right;
      side->value = carver.take(size);
      side->square = carver.take(size);
      side->by_slope = carver.take(size);
      side->by_level = carver.take(size);
    }
    slope_ = carver.take(high_ * wide_);
    level_ = carver.take(high_ * wide_);
    along_ = reinterpret_cast<int64_t*>(carver.take(2 * wide_));
    right_col_ = reinterpret_cast<int64_t*>(carver.take(2 * wide_));
    down_ = reinterpret_cast<int64_t*>(carver.take(2 * high_));
    for (int64_t k = 0; k < wide_; ++k) along_[k] = k;
    for (int64_t k = 0; k < wide_; ++k) right_col_[k] = k * p.right.col;
    for (int64_t k = 0; k < high_; ++k) down_[k] = k * wide_;
  }

  void run() {
    gather_lanes(left_, rows_, p_.left.data, p_.left.sample, p_.left.col.data());
    for (int64_t c = columns_.begin; c < columns_.end; c += wide_) {
      const int64_t width = std::min(wide_, columns_.end - c);
      gather_lanes(right_, width, p_.right.data + c * p_.right.col, p_.right.sample, right_col_);
      for (int64_t r = 0; r < rows_; r += high_) {
        const int64_t height = std::min(high_, rows_ - r);
        load_upstream(r, height, c, width);
        for (int64_t j = 0; j < panels_; ++j) products(j, r, height, c, width);
      }
      combine(right_, width, grad_.right + c, p_.right.width);
    }
    combine(left_, rows_, grad_.left, grad_.left_sample);
  }

 private:
  struct Side {  // each [panel][width][R], lanes being samples
    float *value, *square, *by_slope, *by_level;
  };

  void gather_lanes(const Side& side, int64_t width, const float* data, int64_t sample,
                    const int64_t* col) {
    for (int64_t j = 0; j < panels_; ++j)
      for (int64_t v = 0; v < R; ++v) {
        const bool there = j * R + v < group_.count;
        const float* from = data + (there ? group_.samples[j * R + v] * sample : 0);
        float* value = side.value + j * width * R + v;
        for (int64_t k = 0; k < width; ++k) value[k * R] = there ? from[col[k]] : 0.f;
      }
    for (int64_t k = 0; k < panels_ * width * R; k += W) {
      const vec x = load(side.value + k);
      store(side.square + k, x * x);
    }
  }

  void load_upstream(int64_t r, int64_t height, int64_t c, int64_t width) {
    const float n = static_cast<float>(up_.count);
    for (int64_t k = 0; k < height; ++k) {
      const int64_t at = p_.out(r + k, c);
      const float *variance = up_.grad_variance + at, *mean = up_.mean + at;
      float *slope = slope_ + k * wide_, *level = level_ + k * wide_;
      for (int64_t i = 0; i < width; ++i) {
        slope[i] = variance[i] * (2 / n);
        level[i] = -slope[i] * mean[i];
      }
      if (up_.grad_mean == nullptr) continue;
      for (int64_t i = 0; i < width; ++i) level[i] += up_.grad_mean[at + i] / n;
    }
  }

  void products(int64_t j, int64_t r, int64_t height, int64_t c, int64_t width) {
    const int64_t vectors = group_.count - j * R > W ? 2 : 1;
    const int64_t left = (j * rows_ + r) * R, right = j * width * R;
    const bool first_column = c == columns_.begin, first_row = r == 0;
    const auto tiles = [&](const float* matrix, int64_t row, int64_t count, const int64_t* step,
                           int64_t depth, const float* panel, float* out, bool add) {
      for (int64_t m = 0; m < count; m += ROWS) {
        const int64_t tile = std::min<int64_t>(ROWS, count - m);
        const float* rows[ROWS];
        for (int64_t k = 0; k < tile; ++k) rows[k] = matrix + (m + k) * row;
        tile_routine<ProductRows>(tile, vectors)(rows, step, depth, panel, out + m * R, R, add);
      }
    };
    tiles(slope_, wide_, height, along_, width, right_.square + right, left_.by_slope + left, !first_column);
    tiles(level_, wide_, height, along_, width, right_.value + right, left_.by_level + left, !first_column);
    tiles(slope_, 1, width, down_, height, left_.square + left, right_.by_slope + right, !first_row);
    tiles(level_, 1, width, down_, height, left_.value + left, right_.by_level + right, !first_row);
  }

  void combine(const Side& side, int64_t width, float* to, int64_t sample) {
    for (int64_t s = 0; s < group_.count; ++s) {
      float* out = to + group_.samples[s] * sample;
      const int64_t at = s / R * width * R + s % R;
      const float *value = side.value + at, *slope = side.by_slope + at, *level = side.by_level + at;
      for (int64_t k = 0; k < width; ++k) out[k] = value[k * R] * slope[k * R] + level[k * R];
    }
  }

  const Outer& p_;
  const Upstream& up_;
  const Gradient& grad_;
  const Group group_;
  const Range columns_;
  const int64_t rows_, panels_;
  int64_t wide_, high_;  // of a block of slope and level
  Side left_, right_;
  float *slope_, *level_;
  int64_t *along_, *down_, *right_col_;
};

static void backward_rank1(const Outer& p, const Upstream& up, const Gradient& grad, Group group,
                           Range columns) {
  for (int64_t s = 0; s < group.count; s += RANK1_SAMPLES) {
    const Group part{group.samples + s, std::min(RANK1_SAMPLES, group.count - s)};
    Rank1Backward(p, up, grad, part, columns).run();
  }
}
