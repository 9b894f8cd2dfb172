// Vectors, packing and the register tile. Included once per instruction set, inside its namespace; the
// includer defines FASTDG_LANES (floats in a vector) and FASTDG_ROWS (rows of the register tile).
// Written with the compiler's generic vectors, so that one source serves every instruction set.

constexpr int W = FASTDG_LANES;
constexpr int ROWS = FASTDG_ROWS;
constexpr int R = 2 * W;  // lanes of a packed panel

typedef float vec __attribute__((vector_size(W * 4)));
typedef float loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(W * 4)));

static inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }

// A store past the caches to an aligned address, for values that are not read again soon; call stream_end
// before another thread reads them.
static inline void stream(float* p, vec x) {
#if defined(__x86_64__) && FASTDG_LANES == 16
  _mm512_stream_ps(p, reinterpret_cast<__m512>(x));
#elif defined(__x86_64__) && FASTDG_LANES == 8
  _mm256_stream_ps(p, reinterpret_cast<__m256>(x));
#elif defined(__x86_64__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(x));
#else
  store(p, x);
#endif
}
static inline void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <int H, size_t... L>
static inline float add_lanes(vec x, std::index_sequence<L...> lanes) {
  if constexpr (H == 0) return x[0];
  const ivec other = {static_cast<int32_t>(L ^ H)...};
  return add_lanes<H / 2>(x + __builtin_shuffle(x, other), lanes);
}
static inline float add_lanes(vec x) { return add_lanes<W / 2>(x, std::make_index_sequence<W>()); }

template <int H, size_t... L>
static inline void exchange(vec& a, vec& b, std::index_sequence<L...>) {
  const ivec low = {static_cast<int32_t>(L & H ? L - H + W : L)...};
  const ivec high = {static_cast<int32_t>(L & H ? L + W : L + H)...};
  const vec first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}

template <int H>
static inline void transpose_step(vec (&x)[W]) {
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r)
    if (!(r & H)) exchange<H>(x[r], x[r + H], std::make_index_sequence<W>());
  if constexpr (2 * H < W) transpose_step<2 * H>(x);
}

// dst[c * dst_row + r] = src[r * src_row + c] for a block of W x W.
static inline void transpose(float* dst, int64_t dst_row, const float* src, int64_t src_row) {
  vec x[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) x[r] = load(src + r * src_row);
  transpose_step<1>(x);
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) store(dst + r * dst_row, x[r]);
}

// dst[c * dst_row + r] = src[r][c] for rows that lie anywhere.
static inline void transpose(float* dst, int64_t dst_row, const float* const* src) {
  vec x[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) x[r] = load(src[r]);
  transpose_step<1>(x);
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) store(dst + r * dst_row, x[r]);
}

// dst[k * R + v] = src[k * row + v * col] for v < width, 0 for the other lanes.
static void pack(float* dst, const float* src, int64_t row, int64_t col, int64_t depth, int width) {
  if (width < R) std::memset(dst, 0, sizeof(float) * depth * R);
  if (col == 1 && width == R) {
    for (int64_t k = 0; k < depth; ++k) {
      store(dst + k * R, load(src + k * row));
      store(dst + k * R + W, load(src + k * row + W));
    }
    return;
  }
  int64_t k = 0;
  int v = 0;
  if (row == 1)
    for (; v + W <= width; v += W)
      for (k = 0; k + W <= depth; k += W) transpose(dst + k * R + v, R, src + k + v * col, col);
  for (int64_t q = k; q < depth && v; ++q)
    for (int u = 0; u < v; ++u) dst[q * R + u] = src[q * row + u * col];
  for (int64_t q = 0; q < depth; ++q)
    for (int u = v; u < width; ++u) dst[q * R + u] = src[q * row + u * col];
}

// dst[m * dst_left + v * dst_right] = src[m * R + v]; one of the strides is 1.
static void unpack(float* dst, int64_t dst_left, int64_t dst_right, const float* src, int64_t rows,
                   int width) {
  int64_t m = 0;
  int v = 0;
  if (dst_left == 1)
    for (; v + W <= width; v += W)
      for (m = 0; m + W <= rows; m += W)
        transpose(dst + m + v * dst_right, dst_right, src + m * R + v, R);
  for (int64_t q = m; q < rows && v; ++q)
    for (int u = 0; u < v; ++u) dst[q * dst_left + u * dst_right] = src[q * R + u];
  for (int64_t q = 0; q < rows; ++q)
    for (int u = v; u < width; ++u) dst[q * dst_left + u * dst_right] = src[q * R + u];
}

// acc[m][v] += sum_k left[m][step[k]] * panel[k * R + v]; the accumulators stay in registers.
template <int M, int V>
static inline __attribute__((always_inline)) void multiply(vec (&acc)[M][V],
                                                           const float* const (&left)[M],
                                                           const int64_t* step, int64_t depth,
                                                           const float* panel) {
  for (int64_t k = 0; k < depth; ++k, panel += R) {
    const int64_t at = step[k];
    vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = load(panel + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float x = left[m][at];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[m][v] += x * b[v];
    }
  }
}

// Tables of a function template over the rows (1 .. ROWS) and vectors (1, 2) of the register tile.
template <template <int, int> class F, int V, size_t... M>
static constexpr auto row_table(std::index_sequence<M...>) {
  return std::array{&F<static_cast<int>(M) + 1, V>::run...};
}

template <template <int, int> class F>
static auto tile_routine(int64_t rows, int64_t vectors) {
  static constexpr auto one = row_table<F, 1>(std::make_index_sequence<ROWS>());
  static constexpr auto two = row_table<F, 2>(std::make_index_sequence<ROWS>());
  return vectors == 1 ? one[rows - 1] : two[rows - 1];
}
