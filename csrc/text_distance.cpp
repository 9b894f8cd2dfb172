// fastdg::text_distance on the CPU.
#include <tuple>

#include "common.h"
#include "routines.h"

namespace fastdg {

namespace {

constexpr double RELATIVE_SCALE = 10;  // the paper's
constexpr int64_t TASK_FLOATS = 131072;  // of texts that a task reads

// The arguments, checked, and contiguous where the routines want it.
struct Arguments {
  Tensor embeddings, labels, classes, anchors, teacher;
  Texts texts;

  Arguments(const Tensor& s, const Tensor& y, const Tensor& t, const Tensor& k, const Tensor& q)
      : embeddings(rows_of(s)), labels(y.is_contiguous() ? y : torch::stable::contiguous(y)),
        classes(dense(t, "classes")), anchors(dense(k, "anchors")), teacher(dense(q, "teacher")) {
    check_cpu(y, "labels");
    STD_TORCH_CHECK(y.dim() == 1 && y.scalar_type() == torch::headeronly::ScalarType::Long &&
                        y.size(0) == samples(),
                    "labels: expected a vector of ", samples(), " int64");
    const int64_t E = embeddings.size(1);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == E, "classes: expected [C, ", E, "]");
    const int64_t C = t.size(0);
    STD_TORCH_CHECK(k.dim() == 3 && k.size(0) == C && k.size(2) == E, "anchors: expected [", C,
                    ", A, ", E, "]");
    const int64_t A = k.size(1);
    STD_TORCH_CHECK(q.dim() == 2 && q.size(0) == C && q.size(1) == A, "teacher: expected [", C, ", ",
                    A, "]");
    const auto* label = static_cast<const int64_t*>(labels.const_data_ptr());
    for (int64_t n = 0; n < samples(); ++n)
      STD_TORCH_CHECK(label[n] >= 0 && label[n] < C, "labels: class ", label[n], " of ", C);
    texts = {floats(embeddings),
             embeddings.stride(0),
             label,
             floats(classes),
             floats(anchors),
             floats(teacher),
             A,
             E,
             static_cast<float>(RELATIVE_SCALE / static_cast<double>(std::max<int64_t>(1, A)))};
  }

  int64_t samples() const { return embeddings.size(0); }

  // Runs task(range of samples) over all samples.
  template <class Task>
  void for_each_range(const Task& task) const {
    const double floats_each = static_cast<double>(texts.count + 2) * static_cast<double>(texts.width);
    const int64_t block = static_cast<int64_t>(TASK_FLOATS / std::clamp(floats_each, 1.0, 1.0 * TASK_FLOATS));
    for_each_task((samples() + block - 1) / block, [&](int64_t k) {
      task(Range{k * block, std::min(samples(), (k + 1) * block)});
    });
  }

 private:
  static Tensor rows_of(const Tensor& x) {
    check_float(x, "embeddings");
    check_cpu(x, "embeddings");
    STD_TORCH_CHECK(x.dim() == 2, "embeddings: expected [N, E], got ", x.dim(), " dimensions");
    return x.size(1) < 2 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  }
};

Tensor upstream(const Tensor& grad, const char* name, int64_t samples) {
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == samples, name, ": expected [", samples, "]");
  return dense(grad, name);
}

}  // namespace

std::tuple<Tensor, Tensor> text_distance(const Tensor& embeddings, const Tensor& labels,
                                         const Tensor& classes, const Tensor& anchors,
                                         const Tensor& teacher) {
  const Arguments x(embeddings, labels, classes, anchors, teacher);
  const Tensor absolute = allocate(embeddings, {x.samples()});
  const Tensor relative = allocate(embeddings, {x.samples()});
  x.for_each_range([&](Range samples) {
    routines().text_distance(x.texts, samples, floats(absolute), floats(relative));
  });
  return {absolute, relative};
}

Tensor text_distance_backward(const Tensor& grad_absolute, const Tensor& grad_relative,
                              const Tensor& embeddings, const Tensor& labels, const Tensor& classes,
                              const Tensor& anchors, const Tensor& teacher) {
  const Arguments x(embeddings, labels, classes, anchors, teacher);
  const Tensor of_absolute = upstream(grad_absolute, "grad_absolute", x.samples());
  const Tensor of_relative = upstream(grad_relative, "grad_relative", x.samples());
  const Tensor out = allocate(embeddings, {x.samples(), x.texts.width});
  x.for_each_range([&](Range samples) {
    routines().text_distance_backward(x.texts, floats(of_absolute), floats(of_relative), samples,
                                      floats(out));
  });
  return out;
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) {
  m.impl("text_distance", TORCH_BOX(&fastdg::text_distance));
  m.impl("text_distance_backward", TORCH_BOX(&fastdg::text_distance_backward));
}
