#pragma once

#include "cpu/numbers.h"

using __half = sra::cpu::Half;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return __half::nearest(value); }
