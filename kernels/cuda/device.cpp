#include "device.h"

// Of torch's CUDA library; weak, so that this library can be loaded without it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace sra::cuda {

OnDevice::OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "sra_kernels: this torch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
}

Tensor wide_product(const Tensor& left, const Tensor& right) {
  if (left.scalar_type() == ScalarType::Float) return matrix_product(left, right);
  using torch::stable::detail::from;
  const Tensor out = empty(left, {left.size(0), right.size(1)});
  std::array<StableIValue, 4> stack{from(left), from(right), from(ScalarType::Float), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace sra::cuda
