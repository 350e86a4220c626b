#include "product.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "../number_of.h"
#include "experts.h"

namespace sra::cpu {
namespace {

namespace detail = torch::stable::detail;

constexpr int64_t kRowsTogether = 8;

std::atomic<bool> onednn_is_there{true};

// The operator torch's own compiler uses for linear layers on the CPU; false if this torch has another.
bool onednn_product(const Tensor& left, const Tensor& right, const OptionalTensor& bias, Tensor* result) {
  std::array<StableIValue, 6> stack{detail::from(left),
                                    detail::from(transposed(right)),
                                    detail::from(bias),
                                    detail::from(std::string("none")),
                                    detail::from(std::vector<double>{}),
                                    detail::from(std::optional<std::string>())};
  if (torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION) != 0) return false;
  *result = detail::to<Tensor>(stack[0]);
  return true;
}

}  // namespace

bool onednn_is_faster() {
  static const bool faster = [] {
    if (const char* told = std::getenv("SRA_ONEDNN")) return *told == '1';
#if defined(__GNUC__) && defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
#else
    return false;
#endif
  }();
  return faster && onednn_is_there;
}

Tensor product(const Tensor& left, const Tensor& right, const OptionalTensor& bias) {
  const bool any = left.size(0) > 0 && left.size(1) > 0 && right.size(1) > 0;
  Tensor result;
  if (any && onednn_is_faster() && left.scalar_type() == ScalarType::Float) {
    if (onednn_product(left, right, bias, &result)) return result;
    onednn_is_there = false;
  }
  result = matrix_product(left, right);
  if (bias.has_value())
    add_bias(number_of(result), bias->data_ptr(), result.size(0), result.size(1), result.data_ptr());
  return result;
}

int64_t padded_rows(int64_t rows, ScalarType type) {
  if (type == ScalarType::Float && !onednn_is_faster()) return rows;
  return (rows + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
}

}  // namespace sra::cpu
