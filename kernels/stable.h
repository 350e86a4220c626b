// Short names for the LibTorch Stable ABI, which lets one library serve every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
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

// The same numbers without history: other threads do not know that this one is below autograd.
inline Tensor detached(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// left @ right of two matrices of one type, in that type. Into a tensor of ours, since autocast would
// round the factors of a plain product.
inline Tensor matrix_product(const Tensor& left, const Tensor& right) {
  using torch::stable::detail::from;
  const Tensor out = empty(left, {left.size(0), right.size(1)}, left.scalar_type());
  std::array<StableIValue, 3> stack{from(left), from(right), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// "3 x 4", for messages.
inline std::string shape(const Tensor& tensor) {
  std::string text;
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? " x " : "") + std::to_string(tensor.size(d));
  return text;
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// Where a row of a contiguous matrix begins.
inline char* row_of(const Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.data_ptr()) + row * matrix.size(1) * matrix.element_size();
}

inline bool has_shape(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = tensor.size(d) == sizes[d];
  return same;
}

// Whether a kernel that was given `first` can read `tensor` as numbers of `type` in this shape.
inline bool readable(const Tensor& tensor, ScalarType type, const std::vector<int64_t>& sizes,
                     const Tensor& first) {
  return tensor.scalar_type() == type && tensor.is_contiguous() && has_shape(tensor, sizes) &&
         tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index();
}

inline bool readable(const OptionalTensor& tensor, ScalarType type, const std::vector<int64_t>& sizes,
                     const Tensor& first) {
  return !tensor.has_value() || readable(*tensor, type, sizes, first);
}

inline Tensor rows(const Tensor& tensor, int64_t first, int64_t last) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, 0, first, last - first);
}

}  // namespace sra
