// Instruction sets: which are compiled in, which this CPU has, which is in use. No torch, no ISA flags here.
#pragma once

#include <cstdint>
#include <string>

#include "../params.h"

namespace pyconv::cpu {

// An entry of a dispatch list. Lists are ordered, best first and generic last; the first entry that accepts wins.
template <class Params>
struct Kernel {
  const char* name;
  const char* accepts_what;  // in words, for `python -m pyconv info`
  bool exact;                // bit-exact on data whose partial sums are all representable
  bool (*accepts)(const Params&);
  int64_t (*workspace_bytes)(const Params&);
  void (*run)(const Params&);
  // Whether it takes operands element by element that it would take 16 bytes at a time if the channels lay side by side;
  // null: no.
  bool (*gathers)(const Params&) = nullptr;
};

template <class Params>
struct KernelList {
  const Kernel<Params>* entries;
  int count;
};

// What one ISA's object files export: everything the doors can call, as one table.
struct KernelTable {
  const char* isa;
  KernelList<ConvMaxPool2dForwardParams> conv_max_pool2d_forward;
  KernelList<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward;
  void (*bias_act_dropout_forward)(const BiasActDropoutForwardParams&);
  void (*bias_act_dropout_backward)(const BiasActDropoutBackwardParams&);
  // Of the compiled network.
  int64_t (*dense_forward_workspace_bytes)(const DenseForwardParams&);
  void (*dense_forward)(const DenseForwardParams&);
  int64_t (*dense_backward_workspace_bytes)(const DenseBackwardParams&);
  void (*dense_backward)(const DenseBackwardParams&);
  void (*sgd_update)(const SgdUpdateParams&);
  int64_t (*softmax_cross_entropy_workspace_bytes)(const SoftmaxCrossEntropyParams&);
  void (*softmax_cross_entropy)(const SoftmaxCrossEntropyParams&);
  int64_t (*random_distortion_workspace_bytes)(const RandomDistortionParams&);
  void (*random_distortion)(const RandomDistortionParams&);
};

const KernelTable& kernel_table();        // of the ISA in use
const char* isa();                        // its name
int compiled_isa_count();                 // slowest first
const char* compiled_isa(int index);
bool cpu_supports(int index);

enum class SetIsaResult { ok, unknown, unsupported };
SetIsaResult set_isa(const char* name);  // process-wide

// For tests: loads a shared library that exports pyconv_kernel_table(), gives back the name of its table's ISA, and
// makes set_isa() know that name. It is neither compiled in nor ever the default. Throws std::runtime_error.
const char* load_kernel_table(const std::string& path);
constexpr const char* kKernelTableSymbol = "pyconv_kernel_table";
using KernelTableFunction = const KernelTable* (*)();

// Whether kernels that are not exact are passed over; process-wide.
bool exact();
void set_exact(bool only_exact);

template <class Params>
bool is_chosen(const Kernel<Params>& kernel, const Params& params) {
  return (kernel.exact || !exact()) && kernel.accepts(params);
}

template <class Params>
const Kernel<Params>& select_kernel(const KernelList<Params>& list, const Params& params) {
  int i = 0;
  while (i + 1 < list.count && !is_chosen(list.entries[i], params)) ++i;
  return list.entries[i];  // the last entry accepts everything
}

}  // namespace pyconv::cpu
