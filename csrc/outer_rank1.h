// Moments for T = 1, where both are matrix products over the samples of a domain:
// sum g = left^T right, sum g^2 = (left * left)^T (right * right).
// Included once per instruction set, inside its namespace.

// Below this share of mean^2, E[g^2] - mean^2 has lost three digits or more.
constexpr float CANCELS = 1.f / 256;

struct Rank1 {  // one register tile of the output
  const float *left, *left_squared;    // [depth][ROWS]
  const float *right, *right_squared;  // [depth][R]; for DirectTile where sample k lies at right + step[k]
  const int64_t* step;                 // else k * ROWS
  int64_t depth, count;
  bool first, last;  // of the chunks of samples; sums wait in the output between chunks
  float *mean, *variance;
  int64_t stride;
  bool* cancels;  // set where a variance is too small to be that difference
};

template <int M, int V>
struct Rank1Tile {
  static void run(const Rank1& t) {
    vec one[M][V] = {}, two[M][V] = {};
    product(one, t.left, t.right, t);
    put_mean(one, t);
    if (t.variance == nullptr) return;
    product(two, t.left_squared, t.right_squared, t);
    put_variance(two, t);
  }

  static inline void put_mean(vec (&one)[M][V], const Rank1& t) {
    if (!t.first) add(one, t.mean, t.stride);
    if (t.last) scale(one, t.count);
    put(one, t.mean, t.stride);
  }
  static inline void put_variance(vec (&two)[M][V], const Rank1& t) {
    if (!t.first) add(two, t.variance, t.stride);
    if (t.last) {
      scale(two, t.count);
      ivec small{};  // its sign bits
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const vec mean = load(t.mean + m * t.stride + v * W), square = mean * mean;
          // One sample: zero, whatever the rounding; NaN stays.
          const vec spread = t.count == 1 ? mean - mean : two[m][v] - square;
          small |= reinterpret_cast<ivec>(spread - square * CANCELS);
          two[m][v] = spread < vec{} ? vec{} : spread;
        }
      int32_t any = 0;
      for (int l = 0; l < W; ++l) any |= small[l];
      if (any < 0) *t.cancels = true;
    }
    put(two, t.variance, t.stride);
  }

  static inline void product(vec (&acc)[M][V], const float* left, const float* right,
                             const Rank1& t) {
    const float* p[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) p[m] = left + m;
    multiply(acc, p, t.step, t.depth, right);
  }
  static inline void add(vec (&acc)[M][V], const float* from, int64_t stride) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[m][v] += load(from + m * stride + v * W);
  }
  static inline void scale(vec (&acc)[M][V], int64_t count) {
    const vec share = vec{} + 1 / static_cast<float>(count);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[m][v] *= share;
  }
  static inline void put(const vec (&acc)[M][V], float* to, int64_t stride) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(to + m * stride + v * W, acc[m][v]);
  }
};

// All rows of a narrow output, one vector wide: the right factor is read where it lies, and squared in registers.
template <int M, int V>
struct DirectTile {
  static void run(const Rank1& t) {
    vec one[M][V] = {}, two[M][V] = {};
    for (int64_t k = 0; k < t.depth; ++k) {
      const float *left = t.left + k * ROWS, *left_squared = t.left_squared + k * ROWS;
      const vec b = load(t.right + t.step[k]), square = b * b;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        one[m][0] += left[m] * b;
        two[m][0] += left_squared[m] * square;
      }
    }
    Rank1Tile<M, V>::put_mean(one, t);
    if (t.variance != nullptr) Rank1Tile<M, V>::put_variance(two, t);
  }
};

// A tile that sticks out at the right edge is computed beside the output and copied.
static void edge_tile(Rank1 t, int64_t height, int width) {
  alignas(64) float mean[ROWS * R], variance[ROWS * R];
  const auto copy = [&](float* to, int64_t to_row, const float* from, int64_t from_row) {
    for (int64_t m = 0; m < height; ++m)
      std::memcpy(to + m * to_row, from + m * from_row, sizeof(float) * width);
  };
  Rank1 inner = t;
  inner.mean = mean;
  inner.variance = t.variance == nullptr ? nullptr : variance;
  inner.stride = R;
  if (!t.first) {
    copy(mean, R, t.mean, t.stride);
    if (t.variance != nullptr) copy(variance, R, t.variance, t.stride);
  }
  tile_routine<Rank1Tile>(height, width > W ? 2 : 1)(inner);
  copy(t.mean, t.stride, mean, R);
  if (t.variance != nullptr) copy(t.variance, t.stride, variance, R);
}

// The samples' rows of the other factor as `values` [depth][ROWS], and their squares.
static void gather(float* values, float* squares, const float* data, const int64_t* samples, int64_t depth,
                   int64_t sample, const int64_t* col, int64_t columns) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t m = 0; m < ROWS; ++m) {
      const float x = m < columns ? data[samples[k] * sample + col[m]] : 0.f;
      values[k * ROWS + m] = x;
      squares[k * ROWS + m] = x * x;
    }
}

// The moments of one panel of a row again, by two passes over the samples; the second sees what the sum of
// many samples has lost of the mean.
static void centred(const Outer& p, Group group, int64_t row, int64_t column, int64_t width,
                    float* mean, float* variance) {
  const float n = static_cast<float>(group.count);
  float first[R] = {}, second[R] = {}, rest[R] = {};
  const auto samples = [&](const auto& visit) {
    for (int64_t s = 0; s < group.count; ++s) {
      const float left = p.left.data[group.samples[s] * p.left.sample + p.left.col[row]];
      const float* right = p.right.data + group.samples[s] * p.right.sample + column * p.right.col;
      for (int64_t k = 0; k < width; ++k) visit(k, left, right[k * p.right.col]);
    }
  };
  samples([&](int64_t k, float left, float right) { first[k] += left * right; });
  for (int64_t k = 0; k < width; ++k) first[k] /= n;
  samples([&](int64_t k, float left, float right) {
    const float distance = left * right - first[k];
    second[k] += distance * distance;
    rest[k] += distance;
  });
  for (int64_t k = 0; k < width; ++k) {
    mean[k] = first[k];
    variance[k] = std::max(second[k] / n - (rest[k] / n) * (rest[k] / n), 0.f);  // NaN stays
  }
}

// The samples' rows of the factor that fills lanes, and their squares, as panels [depth][R] that lie `panel`
// floats apart: row by row, as they lie in memory.
static void gather_panels(float* values, float* squares, int64_t panel, const Right& right, Range columns,
                          const int64_t* samples, int64_t depth) {
  const int64_t width = columns.end - columns.begin, whole = right.col == 1 ? width / R * R : 0;
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = right.data + samples[k] * right.sample + columns.begin * right.col;
    for (int64_t c = 0; c < whole; c += W) {
      const vec x = load(from + c);
      const int64_t at = c / R * panel + k * R + c % R;
      store(values + at, x);
      store(squares + at, x * x);
    }
    for (int64_t c = whole; c < (width + R - 1) / R * R; ++c) {
      const float x = c < width ? from[c * right.col] : 0.f;
      const int64_t at = c / R * panel + k * R + c % R;
      values[at] = x;
      squares[at] = x * x;
    }
  }
}

static void moments_rank1(const Outer& p, Group group, Range rows, Range columns, float* mean,
                          float* variance) {
  static constexpr auto direct_tile = row_table<DirectTile, 1>(std::make_index_sequence<ROWS>());
  const int64_t total = columns.end - columns.begin;
  // One tile of rows reads the right factor once: copies of it would take as long as the sums.
  const bool direct = rows.end - rows.begin <= ROWS && p.right.col == 1 && total % W == 0;
  const int64_t lanes = direct ? W : R, panels = (total + lanes - 1) / lanes;
  const int64_t chunk = std::min<int64_t>(group.count, RANK1_DEPTH);
  // An odd number of rows: panels do not meet in one cache set
  const int64_t panel = direct ? 0 : (chunk | 1) * R;
  ScratchAllocator allocator(2 * padded(chunk * ROWS) + 2 * panels * panel + padded(2 * chunk));
  float* left = allocator.take(chunk * ROWS);
  float* left_squared = allocator.take(chunk * ROWS);
  float* right = allocator.take(panels * panel);
  float* right_squared = allocator.take(panels * panel);
  auto* step = reinterpret_cast<int64_t*>(allocator.take(2 * chunk));

  for (int64_t s = 0; s < group.count; s += chunk) {
    const int64_t depth = std::min(chunk, group.count - s);
    for (int64_t k = 0; k < depth; ++k) step[k] = direct ? group.samples[s + k] * p.right.sample : k * ROWS;
    if (!direct) gather_panels(right, right_squared, panel, p.right, columns, group.samples + s, depth);
    for (int64_t m = rows.begin; m < rows.end; m += ROWS) {
      const int64_t height = std::min<int64_t>(ROWS, rows.end - m);
      gather(left, left_squared, p.left.data, group.samples + s, depth, p.left.sample,
             p.left.col.data() + m, height);
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t column = columns.begin + j * lanes;
        const int64_t width = std::min<int64_t>(lanes, columns.end - column);
        const int64_t at = p.out(m, column);
        bool cancels = false;
        const Rank1 tile{left, left_squared, direct ? p.right.data + column : right + j * panel,
                         right_squared + j * panel, step, depth, group.count, s == 0,
                         s + depth == group.count, mean + at, variance == nullptr ? nullptr : variance + at,
                         p.out_left, &cancels};
        if (direct)
          direct_tile[height - 1](tile);
        else if (width % W == 0)
          tile_routine<Rank1Tile>(height, width / W)(tile);
        else
          edge_tile(tile, height, static_cast<int>(width));
        for (int64_t k = 0; cancels && group.count > 1 && k < height; ++k)
          centred(p, group, m + k, column, width, mean + p.out(m + k, column),
                  variance + p.out(m + k, column));
      }
    }
  }
}
