// The only file that knows both torch's CUDA side and the CUDA runtime.
#include "cuda_device.h"

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <limits>
#include <mutex>

#include "kernel_table.h"

namespace pyconv {
namespace {

// A call reads 64 + 64 bits of state and numbers its draws by the element, so any step gives the next call other
// numbers; torch wants steps of 4.
constexpr uint64_t kOffsetsPerCall = 4;

void check_capability(c10::Device device) {
  // Asking for the properties of a device takes long; the answer never changes.
  static std::array<std::atomic<bool>, std::numeric_limits<c10::DeviceIndex>::max() + 1> supported{};
  auto& known = supported[static_cast<size_t>(device.index())];
  if (known.load(std::memory_order_relaxed)) return;
  cudaDeviceProp properties;
  const int error = cudaGetDeviceProperties(&properties, device.index());
  TORCH_CHECK(error == cudaSuccess, "pyconv: cannot read the properties of ", device, ": ", cuda::error_name(error),
              ": ", cuda::error_text(error));
  TORCH_CHECK(10 * properties.major + properties.minor >= cuda::kMinimumCapability, "pyconv: ", device, " is a ",
              properties.name, " of compute capability ", properties.major, ".", properties.minor,
              ", but the kernels need at least ", cuda::kMinimumCapability / 10, ".", cuda::kMinimumCapability % 10);
  known.store(true, std::memory_order_relaxed);
}

void* current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return guard.getStreamNativeHandle(guard.getStream(device));
}

cuda::PhiloxState by_value(const at::PhiloxCudaState& state) {
  cuda::PhiloxState philox{};
  if (state.captured_) {
    philox.seed_pointer = state.seed_.ptr;
    philox.offset_pointer = state.offset_.ptr;
    philox.offset_in_graph = state.offset_intragraph_;
  } else {
    philox.seed = state.seed_.val;
    philox.offset = state.offset_.val;
  }
  return philox;
}

}  // namespace

CudaDevice::CudaDevice(c10::Device device) : guard_(device), device_(device), stream_(nullptr) {
  TORCH_CHECK(device.is_cuda(), "pyconv: expected all tensors on one CUDA device, but the first is on ", device);
  check_capability(device);
  stream_ = current_stream(device);
}

void CudaDevice::check(int error, const char* operation, const char* kernel) const {
  TORCH_CHECK(error == 0, "pyconv: the CUDA kernel '", kernel, "' of ", operation, " failed on ", device_, ": ",
              cuda::error_name(error), ": ", cuda::error_text(error));
}

at::Tensor CudaDevice::workspace(int64_t bytes) const {
  // torch's allocator aligns to 512 bytes. The block may be given away as soon as the tensor dies: what reuses it
  // comes later on the same stream.
  return bytes == 0 ? at::Tensor() : at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_));
}

template <class KernelList, class Params>
void CudaDevice::run_first(const KernelList& list, Params& params, const char* operation) const {
  const auto& kernel = cuda::select_kernel(list, params);
  const at::Tensor scratch = workspace(kernel.workspace_bytes(params));
  if (scratch.defined()) params.workspace = scratch.mutable_data_ptr();
  check(kernel.launch(params, stream_), operation, kernel.name);
}

bool CudaDevice::gathers(const ConvMaxPool2dForwardParams& params) const {
  const auto& kernel = cuda::select_kernel(cuda::kernel_table().conv_max_pool2d_forward, params);
  return kernel.gathers != nullptr && kernel.gathers(params);
}

bool CudaDevice::gathers(const ConvMaxPool2dBackwardParams& params) const {
  const auto& kernel = cuda::select_kernel(cuda::kernel_table().conv_max_pool2d_backward, params);
  return kernel.gathers != nullptr && kernel.gathers(params);
}

void CudaDevice::run(ConvMaxPool2dForwardParams& params) const {
  run_first(cuda::kernel_table().conv_max_pool2d_forward, params, "conv_max_pool2d forward");
}

void CudaDevice::run(ConvMaxPool2dBackwardParams& params) const {
  run_first(cuda::kernel_table().conv_max_pool2d_backward, params, "conv_max_pool2d backward");
}

void CudaDevice::run(BiasActDropoutForwardParams& params) const {
  check(cuda::kernel_table().bias_act_dropout_forward(params, stream_), "bias_act_dropout", "forward");
}

void CudaDevice::run(BiasActDropoutBackwardParams& params) const {
  const auto& table = cuda::kernel_table();
  const at::Tensor scratch = workspace(table.bias_act_dropout_backward_workspace_bytes(params));
  if (scratch.defined()) params.workspace = scratch.mutable_data_ptr();
  check(table.bias_act_dropout_backward(params, stream_), "bias_act_dropout", "backward");
}

at::Tensor CudaDevice::draw_dropout_state(const std::optional<at::Generator>& generator) const {
  auto* cuda_generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::globalContext().defaultGenerator(device_));
  at::PhiloxCudaState philox;
  {
    const std::lock_guard<std::mutex> lock(cuda_generator->mutex_);
    philox = cuda_generator->philox_cuda_state(kOffsetsPerCall);
  }
  at::Tensor state = at::empty({2}, at::TensorOptions().dtype(at::kLong).device(device_));
  check(cuda::kernel_table().dropout_state(by_value(philox), state.mutable_data_ptr<int64_t>(), stream_), "dropout",
        "state");
  return state;
}

}  // namespace pyconv
