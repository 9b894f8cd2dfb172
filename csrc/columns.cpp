// The column operators on the CPU: all parameters cut into tasks, each with sums of its own.
#include "column_ops.h"

namespace fastdg {
namespace {

constexpr int64_t TASK_COLUMNS = 16384;  // about
// Results that are larger find no room in the caches, whoever reads them next.
constexpr int64_t STREAM_BYTES = 16 << 20;

struct Piece {
  int64_t tensor;
  Range columns;
};

// Whether all results of a tensor are aligned for stores past the caches.
bool aligned(const Operands& x, int64_t k) {
  for (int64_t row = x.width() - x.results(); row < x.width(); ++row)
    if (reinterpret_cast<uintptr_t>(x.rows(k)[row]) % 64 != 0) return false;
  return true;
}

template <class Op>
void launch(const Op& op, const Operands& x, Sums sums) {
  const int64_t width = sums_of(op), task_columns = std::max(TASK_COLUMNS, 16 * width);
  std::vector<Piece> pieces;
  std::vector<size_t> first;  // piece of each task; then the end
  int64_t room = 0, columns = 0;
  for (int64_t k = 0; k < x.tensors(); ++k)
    for (int64_t c = 0; c < x.size(k); c += task_columns) {
      const Range range{c, std::min(c + task_columns, x.size(k))};
      if (room <= 0) first.push_back(pieces.size()), room = task_columns;
      pieces.push_back({k, range});
      room -= range.end - range.begin;
      columns += range.end - range.begin;
    }
  const int64_t tasks = static_cast<int64_t>(first.size());
  first.push_back(pieces.size());

  const bool large = columns * x.results() * int64_t{sizeof(float)} > STREAM_BYTES;
  const auto& routine = *std::get<ColumnRoutine<Op>*>(routines().columns);
  std::vector<double> parts((Op::BY_TENSOR ? pieces.size() : tasks) * width);
  for_each_task(tasks, [&](int64_t t) {
    for (size_t p = first[t]; p < first[t + 1]; ++p) {
      const auto [k, range] = pieces[p];
      routine(op, {x.rows(k), large && aligned(x, k)}, range,
              parts.data() + (Op::BY_TENSOR ? p : t) * width);
    }
  });

  // Added in order: the same result however many threads there are.
  std::vector<double> totals((Op::BY_TENSOR ? x.tensors() : 1) * width);
  for (size_t p = 0; p * width < parts.size(); ++p)
    for (int64_t s = 0; s < width; ++s)
      totals[(Op::BY_TENSOR ? pieces[p].tensor * width : 0) + s] += parts[p * width + s];
  if constexpr (Op::BY_TENSOR)
    for (int64_t k = 0; k < x.tensors(); ++k)
      for (int64_t s = 0; s < width; ++s) sums.data[s][k] = static_cast<float>(totals[k * width + s]);
  else
    for (int64_t s = 0; s < width; ++s) sums.data[0][s] = static_cast<float>(totals[source_of(op, s)]);
}

}  // namespace
}  // namespace fastdg

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CPU, m) { fastdg::implement(m); }
