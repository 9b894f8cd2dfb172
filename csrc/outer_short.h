// Moments for few positions, T <= 8: lanes run along the output's rows, which are written as they lie, and
// the sums of a tile stay in registers over the samples. Included once per instruction set, inside its
// namespace.

constexpr int SHORT_ROWS = W == 16 ? 8 : 4;  // a tile's value, shift and both sums fit the registers together

struct ShortTile {
  const float* left;   // [count][T][SHORT_ROWS]
  const float* right;  // [count][T][W]
  int64_t count;       // samples here, and in the domain
  int64_t domain;
  bool first, last;    // of the chunks of samples; the sums wait in `carry` between chunks
  float* carry;        // [3][SHORT_ROWS][W]
  float *mean, *variance;
  int64_t stride, height, width;  // of the output, of which the tile may stick out
  bool streamed;
};

template <int T>
struct ShortMoments {
  typedef vec Tile[SHORT_ROWS];

  static void run(const ShortTile& t) {
    Tile shift, one, two;
    int64_t s = 0;
    if (t.first) {
      each([&](int m) { shift[m] = one[m] = two[m] = vec{}; });
      form(shift, t, s++);
      each([&](int m) { shift[m] = -shift[m]; });
    } else {
      each([&](int m) {
        shift[m] = load(t.carry + m * W);
        one[m] = load(t.carry + (SHORT_ROWS + m) * W);
        two[m] = load(t.carry + (2 * SHORT_ROWS + m) * W);
      });
    }
    for (; s < t.count; ++s) {
      Tile value;
      each([&](int m) { value[m] = shift[m]; });
      form(value, t, s);
      each([&](int m) {
        one[m] += value[m];
        two[m] += value[m] * value[m];
      });
    }
    if (!t.last) {
      each([&](int m) {
        store(t.carry + m * W, shift[m]);
        store(t.carry + (SHORT_ROWS + m) * W, one[m]);
        store(t.carry + (2 * SHORT_ROWS + m) * W, two[m]);
      });
      return;
    }
    const vec share = vec{} + 1 / static_cast<float>(t.domain);
    each([&](int m) {
      one[m] *= share;
      // shift - shift is 0, or NaN where the first sample was not finite.
      two[m] = two[m] * share - one[m] * one[m] + (shift[m] - shift[m]);
      two[m] = two[m] < vec{} ? vec{} : two[m];  // NaN stays
      one[m] -= shift[m];
    });
    put(t, t.mean, one);
    put(t, t.variance, two);
  }

 private:
  template <class Body>
  static inline __attribute__((always_inline)) void each(const Body& body) {
#pragma GCC unroll 16
    for (int m = 0; m < SHORT_ROWS; ++m) body(m);
  }

  static inline __attribute__((always_inline)) void form(Tile& value, const ShortTile& t, int64_t s) {
    const float *left = t.left + s * T * SHORT_ROWS, *right = t.right + s * T * W;
#pragma GCC unroll 8
    for (int k = 0; k < T; ++k) {
      const vec b = load(right + k * W);
      each([&](int m) { value[m] += left[k * SHORT_ROWS + m] * b; });
    }
  }

  static inline __attribute__((always_inline)) void put(const ShortTile& t, float* to, const Tile& from) {
    if (t.streamed && t.height == SHORT_ROWS && t.width == W) {
      each([&](int m) { stream(to + m * t.stride, from[m]); });
    } else if (t.width == W) {
      for (int64_t m = 0; m < t.height; ++m) store(to + m * t.stride, from[m]);
    } else {
      for (int64_t m = 0; m < t.height; ++m)
        std::memcpy(to + m * t.stride, &from[m], sizeof(float) * t.width);
    }
  }
};

template <template <int> class F, size_t... T>
static constexpr auto position_table(std::index_sequence<T...>) {
  return std::array{&F<static_cast<int>(T) + 1>::run...};
}

static void moments_short(const Outer& p, Group group, Range rows, Range columns, bool streamed, float* mean,
                          float* variance) {
  static constexpr auto table = position_table<ShortMoments>(std::make_index_sequence<SHORT_POSITIONS>());
  const int64_t T = p.positions, width = columns.end - columns.begin, panels = pieces(width, W);
  const int64_t tiles = pieces(rows.end - rows.begin, SHORT_ROWS);
  const int64_t chunk = std::min(group.count, std::max<int64_t>(1, SHORT_DEPTH / T));
  const int64_t panel = (chunk * T | 1) * W;  // an odd number of rows: panels do not meet in one cache set
  const int64_t carry = chunk < group.count ? 3 * SHORT_ROWS * W : 0;
  ScratchAllocator allocator(padded(chunk * T * SHORT_ROWS) + panels * panel + tiles * panels * carry);
  float* left = allocator.take(chunk * T * SHORT_ROWS);
  float* right = allocator.take(panels * panel);
  float* carried = allocator.take(tiles * panels * carry);

  for (int64_t s = 0; s < group.count; s += chunk) {
    const int64_t count = std::min(chunk, group.count - s);
    const auto each_row = [&](const auto& visit) {
      for (int64_t k = 0; k < count; ++k)
        for (int64_t t = 0; t < T; ++t) visit(group.samples[s + k], t, k * T + t);
    };
    each_row([&](int64_t n, int64_t t, int64_t at) {
      const float* from = p.right.data + n * p.right.sample + t * p.right.row + columns.begin * p.right.col;
      for (int64_t c = 0; c < panels * W; c += W)
        if (p.right.col == 1 && c + W <= width)
          store(right + c / W * panel + at * W, load(from + c));
        else
          for (int64_t v = c; v < c + W; ++v)
            right[c / W * panel + at * W + v - c] = v < width ? from[v * p.right.col] : 0.f;
    });
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = rows.begin + i * SHORT_ROWS, height = std::min<int64_t>(SHORT_ROWS, rows.end - row);
      each_row([&](int64_t n, int64_t t, int64_t at) {
        const float* from = p.left.data + n * p.left.sample + p.left.row[t];
        for (int64_t m = 0; m < SHORT_ROWS; ++m)
          left[at * SHORT_ROWS + m] = m < height ? from[p.left.col[row + m]] : 0.f;
      });
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t at = p.out(row, columns.begin + j * W);
        table[T - 1]({left, right + j * panel, count, group.count, s == 0, s + count == group.count,
                      carried + (i * panels + j) * carry, mean + at, variance + at, p.out_left, height,
                      std::min<int64_t>(W, width - j * W), streamed});
      }
    }
  }
  if (streamed) stream_end();
}
