// What every door shares: torch dtypes and layouts in the kernels' terms, torch's thread pool, workspaces, and how
// kernels are run on the CPU. A door is a template over the device, CpuDevice or CudaDevice of cuda_device.h.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string_view>

#include "cpu/isa.h"
#include "params.h"

namespace pyconv {

inline DType kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      TORCH_CHECK(false, "pyconv: expected dtype float32, float64, bfloat16 or float16, but got ", type);
  }
}

constexpr std::string_view kActivationNames[] = {"none", "relu", "sigmoid", "tanh", "gelu", "silu"};

inline Activation parse_activation(std::string_view name) {
  for (int i = 0; i < 6; ++i) {
    if (kActivationNames[i] == name) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(
      false, "activation must be one of 'none', 'relu', 'sigmoid', 'tanh', 'gelu', 'silu', but got '", name, "'");
}

inline void torch_pool_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  // at::parallel_for is a header template: without OpenMP flags it would run serially, and with them a second
  // OpenMP runtime could be mapped. This exported function runs on torch's own pool.
  torch_parallel_for(begin, end, grain, body, context);
}

// Waking a second thread costs 2 to 8 us for each parallel region, of which a call has one to three: work below this many
// operations, 15 us and more, stays on the calling thread. Above it the second thread pays on an idle machine; on a busy
// one each region can wait for a time slice of milliseconds.
constexpr int64_t kSerialOperations = 500000;

// operations: about how many scalar multiply-adds (or elements moved, times a few) the kernel does.
inline Threads threads_for(int64_t operations) {
  const bool serial = operations < kSerialOperations || at::in_parallel_region();
  return {serial ? int64_t(1) : static_cast<int64_t>(at::get_num_threads()), torch_pool_parallel_for};
}

// Scratch memory of one kernel call, aligned to 64 bytes. A thread keeps its block for the next call: fetching hundreds
// of kilobytes from the system and touching them anew costs more than a small layer's arithmetic.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    const auto size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
    if (size > kKeptBytes) {
      own_ = allocate(size);
      data_ = own_.get();
      return;
    }
    thread_local Block kept;
    thread_local size_t kept_size = 0;
    if (size > kept_size) {
      kept.reset();
      kept_size = 0;
      kept = allocate(size);
      kept_size = size;
    }
    data_ = kept.get();
  }
  void* data() const { return data_; }

 private:
  static constexpr size_t kKeptBytes = size_t(32) << 20;
  struct Free {
    void operator()(void* block) const { ::operator delete(block, std::align_val_t(64)); }
  };
  using Block = std::unique_ptr<void, Free>;
  static Block allocate(size_t size) { return Block(::operator new(size, std::align_val_t(64))); }

  Block own_;
  void* data_;
};

class CpuDevice {
 public:
  explicit CpuDevice(c10::Device) {}

  // Without the dispatcher's two hops of at::empty: on a small image they are a tenth of the call.
  static at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return at::detail::empty_cpu(sizes, options);
  }

  Threads threads(int64_t operations) const { return threads_for(operations); }

  // Whether the kernel that takes `params` gathers: see cpu::Kernel.
  bool gathers(const ConvMaxPool2dForwardParams& params) const {
    return gathers(cpu::kernel_table().conv_max_pool2d_forward, params);
  }
  bool gathers(const ConvMaxPool2dBackwardParams& params) const {
    return gathers(cpu::kernel_table().conv_max_pool2d_backward, params);
  }

  void run(ConvMaxPool2dForwardParams& params) const {
    run_first(cpu::kernel_table().conv_max_pool2d_forward, params);
  }
  void run(ConvMaxPool2dBackwardParams& params) const {
    run_first(cpu::kernel_table().conv_max_pool2d_backward, params);
  }
  void run(BiasActDropoutForwardParams& params) const { cpu::kernel_table().bias_act_dropout_forward(params); }
  void run(BiasActDropoutBackwardParams& params) const { cpu::kernel_table().bias_act_dropout_backward(params); }

 private:
  template <class Params>
  static bool gathers(const cpu::KernelList<Params>& list, const Params& params) {
    const auto& kernel = cpu::select_kernel(list, params);
    return kernel.gathers != nullptr && kernel.gathers(params);
  }

  // The first entry of the list that accepts.
  template <class Params>
  static void run_first(const cpu::KernelList<Params>& list, Params& params) {
    const auto& kernel = cpu::select_kernel(list, params);
    const Workspace workspace(kernel.workspace_bytes(params));
    params.workspace = workspace.data();
    kernel.run(params);
  }
};

}  // namespace pyconv
