// What the operators need of torch on a GPU.
#ifndef SRA_CUDA_DEVICE_H
#define SRA_CUDA_DEVICE_H

#include <torch/csrc/stable/accelerator.h>

#include "../stable.h"

// Of the operators in cuda/.
#define SRA_DEVICE CUDA

namespace sra::cuda {

// While it lives, work goes to the device of `tensor`, on torch's current stream there.
class __attribute__((visibility("hidden"))) OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// left @ right in float32, of two matrices of one type, summed up in float32.
Tensor wide_product(const Tensor& left, const Tensor& right);

}  // namespace sra::cuda

#endif
