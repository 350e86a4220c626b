// The kind of a tensor's numbers.
#pragma once

#include "stable.h"
#include "number.h"

namespace sra {

inline Number number_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::BFloat16) return Number::kBFloat16;
  if (type == ScalarType::Half) return Number::kHalf;
  STD_TORCH_CHECK(type == ScalarType::Float, "sra_kernels: float32, bfloat16 or float16 expected");
  return Number::kFloat;
}

}  // namespace sra
