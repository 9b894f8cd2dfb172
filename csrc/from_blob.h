// torch_from_blob takes a deleter from torch 2.11 on; we are built for 2.10 and look it up at run time.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

namespace fastdg {

using FromBlob = AOTITorchError(void* data, int64_t dims, const int64_t* sizes,
                                const int64_t* strides, int64_t storage_offset, int32_t dtype,
                                int32_t device_type, int32_t device_index, AtenTensorHandle* tensor,
                                int32_t layout, const uint8_t* opaque_metadata,
                                int64_t opaque_metadata_size,
                                void (*deleter)(void* data, void* context), void* context);

}  // namespace fastdg
