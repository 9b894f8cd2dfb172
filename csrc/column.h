// What a column operator does with the D values that the domains have at one place of one parameter.
//
// Included by the CPU launcher inside the namespace of an instruction set, where Value is a vector of
// adjacent columns, and by the CUDA launcher, where it is a float: one arithmetic for both.
// The includer defines FASTDG_DEVICE, the qualifiers of a function.

// u = variance + history * ema at column `at` of a parameter of `size` columns; ema may be null.
template <class Value>
struct GapColumn {
  const float *variance, *ema;
  int64_t size, at;
  float history;

  FASTDG_DEVICE Value operator()(int domain) const {
    const int64_t k = domain * size + at;
    Value u = Read<Value>::from(variance + k);
    if (ema != nullptr) u += history * Read<Value>::from(ema + k);
    return u;
  }
};

// The mean over the domains present.
template <class Value>
FASTDG_DEVICE Value gap_centre(const GapColumn<Value>& u, const bool* present, int domains) {
  Value sum{};
  float count = 0;
  for (int d = 0; d < domains; ++d)
    if (present[d]) {
      sum += u(d);
      count += 1;
    }
  return sum / (count > 0 ? count : 1.f);
}

// sum_d (u_d - centre)^2
template <class Value>
FASTDG_DEVICE Value gap_value(const GapColumn<Value>& u, const bool* present, int domains) {
  const Value centre = gap_centre(u, present, domains);
  Value total{};
  for (int d = 0; d < domains; ++d)
    if (present[d]) {
      const Value gap = u(d) - centre;
      total += gap * gap;
    }
  return total;
}

// scale * (u_d - centre) for each domain, 0 for those absent; scale = 2 is the derivative of gap_value.
template <class Value>
FASTDG_DEVICE void gap_gradient(const GapColumn<Value>& u, const bool* present, int domains,
                                float scale, float* grad) {
  const Value centre = gap_centre(u, present, domains);
  for (int d = 0; d < domains; ++d) {
    const Value out = present[d] ? (u(d) - centre) * scale : Value{};
    Read<Value>::to(grad + d * u.size + u.at, out);
  }
}
