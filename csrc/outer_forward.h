// Moments of sums of outer products. Included once per instruction set, inside its namespace.
//
// A sample's gradient is formed one register tile at a time and never leaves the registers: it is added,
// and its square is added, to the sums of its domain. Sums are taken around the first sample's value,
// so that the variance does not cancel when a domain's samples agree.

struct Chunk {           // samples whose right factor is packed
  const int64_t* base;   // where each one's left factor begins
  int64_t count;
  const float* panels;   // [count][T][R]
  const int64_t* row;    // [T]
  int64_t positions;
  bool first;            // the domain's first sample is in it
};

struct Sums {  // each [rows][R]
  float *shift, *first, *second;
};

template <int M, int V>
struct MomentsTile {
  static void run(const Chunk& chunk, const float* left, const int64_t* col, Sums sums) {
    int64_t s = 0;
    if (chunk.first) {
      vec acc[M][V] = {};
      form(acc, chunk, 0, left, col);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          store(sums.shift + m * R + v * W, -acc[m][v]);
          store(sums.first + m * R + v * W, vec{});
          store(sums.second + m * R + v * W, vec{});
        }
      s = 1;
    }
    for (; s < chunk.count; ++s) {
      vec acc[M][V];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[m][v] = load(sums.shift + m * R + v * W);
      form(acc, chunk, s, left, col);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          float* one = sums.first + m * R + v * W;
          float* two = sums.second + m * R + v * W;
          store(one, load(one) + acc[m][v]);
          store(two, load(two) + acc[m][v] * acc[m][v]);
        }
    }
  }

  static inline __attribute__((always_inline)) void form(vec (&acc)[M][V], const Chunk& chunk,
                                                         int64_t s, const float* left,
                                                         const int64_t* col) {
    const float* p[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) p[m] = left + chunk.base[s] + col[m];
    multiply(acc, p, chunk.row, chunk.positions, chunk.panels + s * chunk.positions * R);
  }
};

// The sums themselves, without squares: they stay in registers over all samples of the chunk.
template <int M, int V>
struct MeanTile {
  static void run(const Chunk& chunk, const float* left, const int64_t* col, Sums sums) {
    vec acc[M][V] = {};
    for (int64_t s = 0; s < chunk.count; ++s) MomentsTile<M, V>::form(acc, chunk, s, left, col);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* one = sums.first + m * R + v * W;
        store(one, chunk.first ? acc[m][v] : load(one) + acc[m][v]);
      }
  }
};

// Writes a block of sums as mean and variance. The block is turned to the layout of the output.
static void finish(Sums sums, int64_t rows, int width, int64_t count, float* mean, float* variance,
                   int64_t out_left, int64_t out_right) {
  const vec n = vec{} + static_cast<float>(count);
  for (int64_t k = 0; k < rows * R; k += W) {
    const vec one = load(sums.first + k) / n;
    if (variance == nullptr) {
      store(sums.first + k, one);
      continue;
    }
    const vec shift = load(sums.shift + k);
    // shift - shift is 0, or NaN where the first sample was not finite.
    const vec two = load(sums.second + k) / n - one * one + (shift - shift);
    store(sums.first + k, one - shift);
    store(sums.second + k, two < vec{} ? vec{} : two);  // NaN stays
  }
  unpack(mean, out_left, out_right, sums.first, rows, width);
  if (variance != nullptr) unpack(variance, out_left, out_right, sums.second, rows, width);
}

static void moments(const Outer& p, Group group, Range range, int64_t column, float* mean,
                    float* variance) {
  const int64_t T = p.positions, rows = range.end - range.begin;
  const int width = static_cast<int>(std::min<int64_t>(R, p.right.width - column));
  const int vectors = width > W ? 2 : 1;
  // Panels of a chunk stay in the first-level cache while the tiles pass over them.
  const int64_t fit = std::max<int64_t>(1, PANEL_FLOATS / (T * R));
  const int64_t step = std::min(fit, group.count);
  // With one chunk, sums live for one block only; else they have to outlive the chunks.
  const int64_t block = step == group.count ? std::min<int64_t>(rows, SUM_ROWS) : rows;

  ScratchAllocator allocator(padded(step * T * R) + 3 * block * R + 2 * padded(2 * step));
  float* panels = allocator.take(step * T * R);
  const Sums sums{allocator.take(block * R), allocator.take(block * R), allocator.take(block * R)};
  auto* base = reinterpret_cast<int64_t*>(allocator.take(2 * step));

  for (int64_t s = 0; s < group.count; s += step) {
    const int64_t count = std::min(step, group.count - s);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t n = group.samples[s + k];
      base[k] = n * p.left.sample;
      pack(panels + k * T * R, p.right.data + n * p.right.sample + column * p.right.col,
           p.right.row, p.right.col, T, width);
    }
    const Chunk chunk{base, count, panels, p.left.row.data(), T, s == 0};
    for (int64_t b = 0; b < rows; b += block) {
      const int64_t end = std::min(rows, b + block);
      for (int64_t m = b; m < end; m += ROWS) {
        const int64_t height = std::min<int64_t>(ROWS, end - m);
        const Sums at{sums.shift + (m - b) * R, sums.first + (m - b) * R, sums.second + (m - b) * R};
        const auto run = variance == nullptr ? tile_routine<MeanTile>(height, vectors)
                                            : tile_routine<MomentsTile>(height, vectors);
        run(chunk, p.left.data, p.left.col.data() + range.begin + m, at);
      }
      if (s + count == group.count) {
        const int64_t at = p.out(range.begin + b, column);
        finish(sums, end - b, width, group.count, mean + at,
               variance == nullptr ? nullptr : variance + at, p.out_left, p.out_right);
      }
    }
  }
}
