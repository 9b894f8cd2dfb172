// Squared norms of sums of outer products, in two contraction orders. Included once per instruction set,
// inside its namespace.

template <int M, int V>
struct SquareTile {  // adds the squares of one tile of g to a vector
  static void run(const float* left, const int64_t* col, const int64_t* row, int64_t depth,
                  const float* panel, vec* total) {
    vec acc[M][V] = {};
    const float* p[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) p[m] = left + col[m];
    multiply(acc, p, row, depth, panel);
    vec sum{};
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum += acc[m][v] * acc[m][v];
    *total += sum;
  }
};

template <int M, int V>
struct ProductTile {  // adds <x, y> of a tile of left left^T and one of right right^T
  static void run(const float* const* left, const float* const* right, const int64_t* left_step,
                  const int64_t* right_step, int64_t left_depth, int64_t right_depth,
                  const float* left_panel, const float* right_panel, vec* total) {
    vec x[M][V] = {}, y[M][V] = {};
    const float *p[M], *q[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) p[m] = left[m], q[m] = right[m];
    multiply(x, p, left_step, left_depth, left_panel);
    multiply(y, q, right_step, right_depth, right_panel);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) *total += x[m][v] * y[m][v];
  }
};

static float norm_direct(const Outer& p, int64_t n) {
  const int64_t T = p.positions, rows = p.left_width();
  ScratchAllocator allocator(padded(T * R));
  float* panel = allocator.take(T * R);
  vec total{};
  for (int64_t column = 0; column < p.right.width; column += R) {
    const int width = static_cast<int>(std::min<int64_t>(R, p.right.width - column));
    pack(panel, p.right.data + n * p.right.sample + column * p.right.col, p.right.row, p.right.col,
         T, width);
    for (int64_t m = 0; m < rows; m += ROWS)
      tile_routine<SquareTile>(std::min<int64_t>(ROWS, rows - m), width > W ? 2 : 1)(
          p.left.data + n * p.left.sample, p.left.col.data() + m, p.left.row.data(), T, panel,
          &total);
  }
  return add_lanes(total);
}

static float norm_gram(const Outer& p, int64_t n) {
  const int64_t T = p.positions, I = p.left_width(), O = p.right.width;
  const float* left = p.left.data + n * p.left.sample;
  const float* right = p.right.data + n * p.right.sample;
  ScratchAllocator allocator(padded(I * R) + padded(O * R) + padded(2 * O));
  float* left_panel = allocator.take(I * R);
  float* right_panel = allocator.take(O * R);
  auto* step = reinterpret_cast<int64_t*>(allocator.take(2 * O));
  for (int64_t o = 0; o < O; ++o) step[o] = o * p.right.col;
  vec total{};
  for (int64_t s = 0; s < T; s += R) {
    const int width = static_cast<int>(std::min<int64_t>(R, T - s));
    for (int64_t i = 0; i < I; ++i)
      for (int v = 0; v < R; ++v)
        left_panel[i * R + v] = v < width ? left[p.left.row[s + v] + p.left.col[i]] : 0.f;
    pack(right_panel, right + s * p.right.row, p.right.col, p.right.row, O, width);
    for (int64_t t = 0; t < T; t += ROWS) {
      const int64_t height = std::min<int64_t>(ROWS, T - t);
      const float *x[ROWS], *y[ROWS];
      for (int64_t m = 0; m < height; ++m) {
        x[m] = left + p.left.row[t + m];
        y[m] = right + (t + m) * p.right.row;
      }
      tile_routine<ProductTile>(height, width > W ? 2 : 1)(
          x, y, p.left.col.data(), step, I, O, left_panel, right_panel, &total);
    }
  }
  return add_lanes(total);
}
