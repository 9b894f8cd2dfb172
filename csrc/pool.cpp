#include "pool.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif

namespace fastdg {

using torch::stable::Tensor;

namespace {

constexpr size_t kSmallest = size_t(1) << 20;   // below this the system allocator keeps blocks by itself
constexpr size_t kAlignment = size_t(1) << 21;  // of a huge page

class Pool {
 public:
  void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = free_.lower_bound(bytes);
    void* block = nullptr;
    if (found != free_.end() && found->first <= bytes + bytes / 4) {
      bytes = found->first;
      block = found->second;
      free_.erase(found);
      free_bytes_ -= bytes;
    } else {
      if (posix_memalign(&block, kAlignment, bytes) != 0) return nullptr;
#if defined(__linux__)
      madvise(block, bytes, MADV_HUGEPAGE);  // a hint: fewer faults the first time
#endif
    }
    used_[block] = bytes;
    used_bytes_ += bytes;
    most_used_ = std::max(most_used_, used_bytes_);
    trim();
    return block;
  }

  void give(void* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = used_.find(block);
    free_.emplace(found->second, block);
    free_bytes_ += found->second;
    used_bytes_ -= found->second;
    used_.erase(found);
    trim();
  }

 private:
  // Never hold more than was once in use at the same time.
  void trim() {
    while (!free_.empty() && free_bytes_ + used_bytes_ > most_used_) {
      auto smallest = free_.begin();
      free_bytes_ -= smallest->first;
      std::free(smallest->second);
      free_.erase(smallest);
    }
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  std::unordered_map<void*, size_t> used_;
  size_t free_bytes_ = 0, used_bytes_ = 0, most_used_ = 0;
};

Pool& pool() {
  static Pool* pool = new Pool;  // outlives every tensor, those freed at exit among them
  return *pool;
}

// torch_from_blob takes a deleter from torch 2.11 on; we are built for 2.10 and look it up.
using FromBlob = AOTITorchError (*)(
    void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

FromBlob from_blob() {
#if defined(__linux__)
  static const FromBlob found =
      reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes) {
  size_t bytes = sizeof(float);
  for (int64_t size : sizes) bytes *= static_cast<size_t>(size);
  void* block = bytes >= kSmallest && from_blob() != nullptr ? pool().take(bytes) : nullptr;
  if (block == nullptr) return torch::stable::new_empty(like, sizes);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(from_blob()(
      block, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), like.get_device_index(), &handle,
      aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { pool().give(data); }, nullptr));
  return Tensor(handle);
}

}  // namespace fastdg
