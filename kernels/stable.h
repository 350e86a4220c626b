// Short names for the LibTorch Stable ABI, which lets one library serve every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

namespace sra {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, sizes, type);
}

inline Tensor zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType type = ScalarType::Float) {
  return torch::stable::new_zeros(like, sizes, type);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? data<const T>(*tensor) : nullptr;
}

inline Tensor to_float(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
}

// Float32 matrices in, float32 out; autocast would change that unseen.
inline Tensor product(const Tensor& left, const Tensor& right) {
  Tensor result = torch::stable::matmul(left, right);
  STD_TORCH_CHECK(result.scalar_type() == ScalarType::Float, "sra_kernels: call this outside of autocast");
  return result;
}

}  // namespace sra
