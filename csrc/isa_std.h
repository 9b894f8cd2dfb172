// What isa.h needs from the standard library and from this one.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "routines.h"
#include "scratch.h"

#define FASTDG_TEXT(x) #x
#define FASTDG_NAME(x) FASTDG_TEXT(x)
