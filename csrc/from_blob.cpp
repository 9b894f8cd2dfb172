// Compares the signature that pool.cpp looks up with the one of the installed headers, where these have it.
// They declare it only in builds for torch 2.11, so this file, which makes no code, is built for that.
#include <torch/headeronly/version.h>

#undef TORCH_TARGET_VERSION
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "from_blob.h"

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
static_assert(std::is_same_v<decltype(torch_from_blob), fastdg::FromBlob>,
              "the declaration in from_blob.h is out of date");
#endif
