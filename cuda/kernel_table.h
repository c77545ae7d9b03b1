// Everything the CUDA door can call, as one table. Plain C++: the doors are compiled without the CUDA headers.
//
// A launcher takes params and a stream and gives back an error code (a cudaError_t; 0: no error). It never synchronises
// and never allocates: the door passes a workspace of the size that the kernel asks for.
#pragma once

#include <cstdint>

#include "params.h"

namespace pyconv::cuda {

using Stream = void*;  // a cudaStream_t

// An entry of a dispatch list. Lists are ordered, best first and generic last; the first entry that accepts wins.
template <class Params>
struct Kernel {
  const char* name;
  const char* accepts_what;  // in words, for `python -m pyconv info`
  bool exact;                // bit-exact on data whose partial sums are all representable
  bool (*accepts)(const Params&);
  int64_t (*workspace_bytes)(const Params&);
  int (*launch)(const Params&, Stream);
  // Whether it takes operands element by element that it would take 16 bytes at a time if the channels lay side by side;
  // null: no.
  bool (*gathers)(const Params&) = nullptr;
};

template <class Params>
struct KernelList {
  const Kernel<Params>* entries;
  int count;
};

// What torch's PhiloxCudaState holds. While a graph is captured the two words lie in device memory, written anew before
// each replay, and offset_in_graph is added to the second.
struct PhiloxState {
  uint64_t seed, offset;         // used where the pointers are null
  const int64_t* seed_pointer;   // device memory
  const int64_t* offset_pointer;
  uint64_t offset_in_graph;
};

struct KernelTable {
  KernelList<ConvMaxPool2dForwardParams> conv_max_pool2d_forward;
  KernelList<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward;
  int (*bias_act_dropout_forward)(const BiasActDropoutForwardParams&, Stream);
  int64_t (*bias_act_dropout_backward_workspace_bytes)(const BiasActDropoutBackwardParams&);
  int (*bias_act_dropout_backward)(const BiasActDropoutBackwardParams&, Stream);
  // Writes (seed, offset) to `state`, two int64 in device memory.
  int (*dropout_state)(const PhiloxState&, int64_t* state, Stream);
};

const KernelTable& kernel_table();

// "name: what it means" of a launcher's error code.
const char* error_name(int error);
const char* error_text(int error);

// The oldest GPU the kernels are compiled for, as 10 * major + minor.
constexpr int kMinimumCapability = 80;

template <class Params>
const Kernel<Params>& select_kernel(const KernelList<Params>& list, const Params& params) {
  int i = 0;
  while (i + 1 < list.count && !list.entries[i].accepts(params)) ++i;
  return list.entries[i];  // the last entry accepts everything
}

}  // namespace pyconv::cuda
