#include "product.h"

#include <atomic>
#include <string>

namespace sra::cpu {
namespace {

namespace detail = torch::stable::detail;

constexpr int64_t kRowsTogether = 8;

// The operator torch's own compiler uses for linear layers on the CPU; false if this torch has another.
bool onednn_product(const Tensor& left, const Tensor& right, Tensor* result) {
  std::array<StableIValue, 6> stack{detail::from(left),
                                    detail::from(transposed(right)),
                                    detail::from(OptionalTensor()),
                                    detail::from(std::string("none")),
                                    detail::from(std::vector<double>{}),
                                    detail::from(std::optional<std::string>())};
  if (torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION) != 0) return false;
  *result = detail::to<Tensor>(stack[0]);
  return true;
}

// On AMD processors with AVX-512, MKL's float32 products run at half the speed of oneDNN's (Zen 5: 98
// against 215 GFLOP/s a core).
bool onednn_is_faster() {
#if defined(__GNUC__) && defined(__x86_64__)
  static const bool faster = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
  }();
  return faster;
#else
  return false;
#endif
}

}  // namespace

Tensor product(const Tensor& left, const Tensor& right) {
  static std::atomic<bool> onednn_is_there{true};
  const bool any = left.size(0) > 0 && left.size(1) > 0 && right.size(1) > 0;
  Tensor result;
  if (any && onednn_is_faster() && left.scalar_type() == ScalarType::Float && onednn_is_there) {
    if (onednn_product(left, right, &result)) return result;
    onednn_is_there = false;
  }
  return matrix_product(left, right);
}

int64_t padded_rows(int64_t rows, ScalarType type) {
  if (type == ScalarType::Float && !onednn_is_faster()) return rows;
  return (rows + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
}

}  // namespace sra::cpu
