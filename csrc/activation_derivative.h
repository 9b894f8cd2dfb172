// The derivative of an activation's input gradient. Included once per instruction set, inside its namespace,
// after columns.h.

struct Slopes {  // first and second derivative of an activation
  vec one, two;
};

// exp(-x) of x >= 0
static inline vec decay(vec x) {
  const vec power = exponential(x > 87.f ? vec{} - 87.f : -x);
  return x > 87.f ? vec{} : power;
}

// With density exp(-x^2 / 2) / sqrt(2 pi). Of a normal distribution, the share above |x| is exp(-x^2 / 2) times
// half a polynomial in 1 / (1 + 0.325 |x| / sqrt(2)), within 5e-8 of itself.
struct Gelu {
  static Slopes at(vec x) {
    const vec square = x * x, power = decay(square * 0.5f), density = power * 0.39894228f;
    const vec t = 1.f / (absolute(x) * (0.325f * 0.70710678f) + 1.f);
    vec above = t * -0.15804093f + 0.58733082f;
    above = above * t - 0.56736577f;
    above = above * t + 0.61341155f;
    above = above * t - 0.071843147f;
    above = above * t + 0.24097331f;
    above = above * t + 0.17093627f;
    above = above * t + 0.18465583f;
    above = above * t - 5.798319e-05f;
    above *= power * 0.5f;
    const vec share = x < 0 ? above : 1.f - above;
    return {share + x * density, density * (2.f - square)};
  }
};

// Of x s(w) with the logistic function s and the derivatives w1 and w2 of w.
static inline Slopes gated(vec x, vec w, vec w1, vec w2) {
  const vec power = decay(absolute(w)), whole = 1.f / (power + 1.f), part = power * whole;
  const vec share = w < 0 ? part : whole, slope = part * whole;
  const vec tilt = w < 0 ? whole - part : part - whole;
  return {share + x * slope * w1, slope * (2.f * w1 + x * (tilt * w1 * w1 + w2))};
}

struct GeluTanh {
  static Slopes at(vec x) {
    constexpr float RATE = 1.5957691f, CUBE = 0.044715f;  // 2 sqrt(2 / pi)
    const vec square = x * x;
    return gated(x, RATE * x * (CUBE * square + 1.f), (3 * RATE * CUBE) * square + RATE, (6 * RATE * CUBE) * x);
  }
};

struct Silu {
  static Slopes at(vec x) { return gated(x, x, vec{} + 1.f, vec{}); }
};

template <class Of>
static void activation_derivative(const Activation& p, Range range) {
  for (int64_t k = range.begin; k < range.end; k += W) {
    const int64_t size = std::min<int64_t>(W, range.end - k);
    float rest[3][W] = {};
    const float *x = p.x + k, *delta = p.delta + k, *up = p.up + k;
    if (size < W) {
      std::copy_n(x, size, rest[0]), std::copy_n(delta, size, rest[1]), std::copy_n(up, size, rest[2]);
      x = rest[0], delta = rest[1], up = rest[2];
    }
    const Slopes slopes = Of::at(load(x));
    const vec above = load(up), of_x = above * load(delta) * slopes.two, of_delta = above * slopes.one;
    if (size == W) {
      store(p.of_x + k, of_x), store(p.of_delta + k, of_delta);
    } else {
      store(rest[0], of_x), store(rest[1], of_delta);
      std::copy_n(rest[0], size, p.of_x + k), std::copy_n(rest[1], size, p.of_delta + k);
    }
  }
}

static void activation_derivative(const Activation& p, Range range) {
  static constexpr std::array run{&activation_derivative<Gelu>, &activation_derivative<GeluTanh>,
                                  &activation_derivative<Silu>};
  run[p.kind](p, range);
}
