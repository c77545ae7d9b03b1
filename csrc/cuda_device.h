// How a door runs kernels on a GPU: CudaDevice, the counterpart of CpuDevice in door.h. Without PYCONV_WITH_CUDA there
// is nothing to run, only an error to give. No CUDA header is needed here.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <optional>

#include "params.h"

namespace pyconv {

#ifdef PYCONV_WITH_CUDA

// Makes `device` the current one for its lifetime. Kernels run on the stream that is current there, with workspaces
// from torch's allocator; the host waits for nothing.
class CudaDevice {
 public:
  // Raises for a GPU that the kernels are not compiled for.
  explicit CudaDevice(c10::Device device);

  static at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

  Threads threads(int64_t) const { return {}; }

  // Whether the kernel that takes `params` gathers: see cuda::Kernel.
  bool gathers(const ConvMaxPool2dForwardParams& params) const;
  bool gathers(const ConvMaxPool2dBackwardParams& params) const;

  void run(ConvMaxPool2dForwardParams& params) const;
  void run(ConvMaxPool2dBackwardParams& params) const;
  void run(BiasActDropoutForwardParams& params) const;
  void run(BiasActDropoutBackwardParams& params) const;

  // (seed, offset), int64 on the device, from the state of `generator` or of the device's default one, which is
  // advanced. While a graph is captured, this is recorded, and each replay draws anew.
  at::Tensor draw_dropout_state(const std::optional<at::Generator>& generator) const;

 private:
  template <class KernelList, class Params>
  void run_first(const KernelList& list, Params& params, const char* operation) const;
  at::Tensor workspace(int64_t bytes) const;
  void check(int error, const char* operation, const char* kernel) const;

  c10::DeviceGuard guard_;
  c10::Device device_;
  void* stream_;  // a cudaStream_t
};

inline at::Tensor draw_dropout_state_cuda(c10::Device device, const std::optional<at::Generator>& generator) {
  return CudaDevice(device).draw_dropout_state(generator);
}

#else

// Registered for CUDA tensors in the place of every kernel.
inline void built_without_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.operator_name().name, ": got a CUDA tensor, but pyconv was built without its CUDA kernels");
}

inline at::Tensor draw_dropout_state_cuda(c10::Device device, const std::optional<at::Generator>&) {
  TORCH_CHECK(false, "dropout: got a tensor on ", device, ", but pyconv was built without its CUDA kernels");
}

#endif

}  // namespace pyconv
