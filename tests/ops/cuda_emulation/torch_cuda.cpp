// What columns_cuda.cu asks of torch's accelerators: there is one device, and one stream on it. Linked with
// -Bsymbolic, these come before torch's own functions.
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = emulation::STREAM;
  return AOTI_TORCH_SUCCESS;
}

__attribute__((visibility("default"))) unsigned emulation_wide_accesses() {
  return static_cast<unsigned>(wide_accesses);
}

__attribute__((visibility("default"))) void emulation_schedule(unsigned seed) {
  emulation::shuffled = seed != 0;
  emulation::shuffler.seed(seed);
}
}
