// A linear map on the CPU, and whether it is worth taking here in the place of torch's.
#include "../stable.h"
#include "product.h"

namespace sra::cpu {
namespace {

// As it is, if its numbers lie row after row or column after column; else a copy, without history.
Tensor plain(const Tensor& matrix) {
  const Tensor own = detached(matrix);
  const bool by_rows = own.stride(1) == 1 && own.stride(0) >= own.size(1);
  const bool by_columns = own.stride(0) == 1 && own.stride(1) >= own.size(0);
  return by_rows || by_columns ? own : torch::stable::contiguous(own);
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "linear: x N x I and a weight O x I expected, got ", shape(x), " and ", shape(weight));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float &&
                      (!bias.has_value() || bias->scalar_type() == ScalarType::Float),
                  "linear: float32 expected");
  STD_TORCH_CHECK(!bias.has_value() || has_shape(*bias, {weight.size(0)}), "linear: a bias for each of the ",
                  weight.size(0), " rows of the weight expected");
  const OptionalTensor added =
      bias.has_value() ? OptionalTensor(torch::stable::contiguous(detached(*bias))) : std::nullopt;
  return product(plain(x), transposed(plain(weight)), added);
}

}  // namespace
}  // namespace sra::cpu

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, CPU, m) { m.impl("linear", TORCH_BOX(&sra::cpu::linear)); }

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, CompositeExplicitAutograd, m) {
  m.impl("onednn_is_faster", TORCH_BOX(&sra::cpu::onednn_is_faster));
}
