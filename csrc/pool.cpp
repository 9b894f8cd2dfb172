#include "pool.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "from_blob.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastdg {

using torch::stable::Tensor;

namespace {

constexpr size_t kSmallest = size_t(1) << 20;   // below this the system allocator keeps blocks by itself
constexpr size_t kAlignment = size_t(1) << 21;  // of a huge page
constexpr int kPeriod = 1024;  // outputs; more than a step of a large network asks for

struct Block {
  void* data;
  size_t bytes;
};

class Pool {
 public:
  // A block of at least `bytes`; null where there is no memory.
  void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    used_.reserve(used_.size() + 1);  // all that can throw, giving back included
    free_.reserve(free_.size() + used_.size() + 1);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 &&
          (best == free_.end() || block->bytes < best->bytes))
        best = block;
    Block found{nullptr, bytes};
    if (best != free_.end()) {
      found = *best;
      free_bytes_ -= found.bytes;
      free_.erase(best);
    } else {
      if (posix_memalign(&found.data, kAlignment, bytes) != 0) return nullptr;
#if defined(__linux__)
      madvise(found.data, bytes, MADV_HUGEPAGE);  // a hint: fewer faults the first time
#endif
    }
    used_.push_back(found);
    used_bytes_ += found.bytes;
    most_used_ = std::max(most_used_, used_bytes_);
    trim();
    return found.data;
  }

  // Ignores memory that was given back already.
  void give(void* data) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto block = std::find_if(used_.begin(), used_.end(),
                                    [data](const Block& b) { return b.data == data; });
    if (block == used_.end()) return;
    free_bytes_ += block->bytes;
    used_bytes_ -= block->bytes;
    free_.push_back(*block);
    *block = used_.back();
    used_.pop_back();
    trim();
  }

  // Counts an output, small ones too; every period forgets the use before the last one.
  void count() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (++counted_ < kPeriod) return;
    counted_ = 0;
    most_used_before_ = most_used_;
    most_used_ = used_bytes_;
    trim();
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // To the kernel: the system allocator may keep a block that it cut from its heap.
  static void give_back(const Block& block) noexcept {
#if defined(__linux__)
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    madvise(block.data, block.bytes / page * page, MADV_DONTNEED);
#endif
    std::free(block.data);
  }

  // Holds little more than was in use at one time of this period or the last; the block that lay idle longest
  // goes. More, since blocks of a step that are not in use together need room beside the most: else the least of them
  // drives out a large one, whose next request drives out another, and so on through every step.
  void trim() noexcept {
    const size_t used = std::max(most_used_, most_used_before_), most = used + used / 4;
    auto block = free_.begin();
    for (; block != free_.end() && free_bytes_ + used_bytes_ > most; ++block) {
      free_bytes_ -= block->bytes;
      give_back(*block);
    }
    free_.erase(free_.begin(), block);
  }

  std::mutex mutex_;
  std::vector<Block> used_;
  std::vector<Block> free_;  // in the order in which they were given back
  size_t free_bytes_ = 0, used_bytes_ = 0, most_used_ = 0, most_used_before_ = 0;
  int counted_ = 0;
};

Pool& pool() {
  static Pool* pool = [] {
    static Pool* made = new Pool;  // outlives every tensor, also one freed at exit
#if defined(__linux__)
    // A child must not inherit a lock that another thread of its parent held.
    pthread_atfork([] { made->mutex().lock(); }, [] { made->mutex().unlock(); },
                   [] { made->mutex().unlock(); });
#endif
    return made;
  }();
  return *pool;
}

FromBlob* from_blob() {
#if defined(__linux__)
  static FromBlob* const found = reinterpret_cast<FromBlob*>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return found;
#else
  return nullptr;
#endif
}

// Of the system allocator; without torch's dispatcher, which takes longer than the rest of a small operator.
Tensor from_system(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes) {
  size_t bytes = sizeof(float);
  for (int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes))
      return torch::stable::new_empty(like, sizes);  // which says that there is no such memory
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  if (from_blob() == nullptr) return from_system(like, sizes, strides);
  pool().count();
  if (bytes < kSmallest) return from_system(like, sizes, strides);
  void* block = pool().take(bytes);
  if (block == nullptr) return from_system(like, sizes, strides);
  AtenTensorHandle handle;
  const AOTITorchError error = from_blob()(
      block, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), like.get_device_index(), &handle,
      aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { pool().give(data); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) {
    pool().give(block);
    STD_TORCH_CHECK(false, "torch_from_blob: no tensor of ", bytes, " bytes");
  }
  return Tensor(handle);
}

}  // namespace fastdg
