#pragma once

#include "cpu/numbers.h"

using __nv_bfloat16 = sra::cpu::BFloat16;
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16::nearest(value); }
