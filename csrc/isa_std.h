// Headers for isa.h, of the standard library and of this one.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"
#include "routines.h"
#include "scratch.h"

#define FASTDG_TEXT(x) #x
#define FASTDG_NAME(x) FASTDG_TEXT(x)
