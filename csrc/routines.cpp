// Which instruction set serves: the widest this machine runs.
#include "routines.h"

#include <atomic>

#include "common.h"

namespace fastdg {

namespace {

std::vector<const Routines*> runnable() {  // narrowest first
  std::vector<const Routines*> found{generic_routines()};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (avx2_routines() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(avx2_routines());
  if (avx512_routines() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back(avx512_routines());
#endif
  return found;
}

std::atomic<const Routines*>& current() {
  static std::atomic<const Routines*> chosen{runnable().back()};
  return chosen;
}

}  // namespace

const Routines& routines() { return *current().load(); }

std::string set_routines(const std::string& name) {
  for (const Routines* candidate : runnable())
    if (name == candidate->name) return current().exchange(candidate)->name;
  std::string names;
  for (const Routines* candidate : runnable()) names += std::string(" ") + candidate->name;
  STD_TORCH_CHECK(false, "set_instruction_set: expected one of", names, ", got ", name);
}

}  // namespace fastdg

STABLE_TORCH_LIBRARY_FRAGMENT(fastdg_cpp, m) {
  m.def("set_instruction_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastdg_cpp, CompositeExplicitAutograd, m) {
  m.impl("set_instruction_set", TORCH_BOX(&fastdg::set_routines));
}
