// The CUDA kernels as one more instruction set of the CPU operators: the doors, and so the whole Python test suite,
// call them without knowing it. pyconv._C._load_kernel_table() loads this library.
#include "kernel_table.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "cpu/isa.h"

namespace pyconv {
namespace {

constexpr size_t kWorkspaceAlignment = 64;

// The only entry that accepts, or empty: then all do. The last of a list takes what nobody accepts.
std::string& preferred() {
  static std::string name;
  return name;
}

void check(int error, const char* launcher) {
  if (error == 0) return;
  std::fprintf(stderr, "pyconv emulation: %s failed: %s: %s\n", launcher, cuda::error_name(error),
               cuda::error_text(error));
  std::abort();
}

// Functions without context, as the CPU's table wants them, for entry I of a list.
template <class Params, auto List, size_t I>
struct Entry {
  static const cuda::Kernel<Params>& kernel() { return (cuda::kernel_table().*List).entries[I]; }
  static bool accepts(const Params& params) {
    return (preferred().empty() || preferred() == kernel().name) && kernel().accepts(params);
  }
  static int64_t workspace_bytes(const Params& params) { return kernel().workspace_bytes(params); }
  static bool gathers(const Params& params) { return kernel().gathers != nullptr && kernel().gathers(params); }
  static void run(const Params& params) { check(kernel().launch(params, nullptr), kernel().name); }
};

template <class Params, auto List, size_t... I>
cpu::KernelList<Params> adapt(std::index_sequence<I...>) {
  constexpr size_t kCapacity = sizeof...(I);
  const int count = (cuda::kernel_table().*List).count;
  if (count > static_cast<int>(kCapacity)) {
    std::fprintf(stderr, "pyconv emulation: %d entries in a dispatch list, room for %zu\n", count, kCapacity);
    std::abort();
  }
  static cpu::Kernel<Params> entries[kCapacity];
  const auto fill = [&](auto entry) {
    using E = decltype(entry);
    return cpu::Kernel<Params>{E::kernel().name, E::kernel().accepts_what,       E::kernel().exact,
                               E::accepts,       E::workspace_bytes, E::run, E::gathers};
  };
  ((static_cast<int>(I) < count ? void(entries[I] = fill(Entry<Params, List, I>{})) : void()), ...);
  return {entries, count};
}

void bias_act_dropout_forward(const BiasActDropoutForwardParams& params) {
  check(cuda::kernel_table().bias_act_dropout_forward(params, nullptr), "bias_act_dropout_forward");
}

// The CPU's door has no workspace for this one.
void bias_act_dropout_backward(const BiasActDropoutBackwardParams& params) {
  const auto& table = cuda::kernel_table();
  const auto bytes = static_cast<size_t>(table.bias_act_dropout_backward_workspace_bytes(params));
  const auto rounded = (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(kWorkspaceAlignment, rounded),
                                                              std::free);
  BiasActDropoutBackwardParams with_workspace = params;
  with_workspace.workspace = workspace.get();
  check(table.bias_act_dropout_backward(with_workspace, nullptr), "bias_act_dropout_backward");
}

constexpr auto kEntries = std::make_index_sequence<8>();

}  // namespace
}  // namespace pyconv

extern "C" {

const pyconv::cpu::KernelTable* pyconv_kernel_table() {
  using namespace pyconv;
  static const cpu::KernelTable table = [] {
    cpu::KernelTable t{};
    t.isa = "cuda_emulation";
    t.conv_max_pool2d_forward =
        adapt<ConvMaxPool2dForwardParams, &cuda::KernelTable::conv_max_pool2d_forward>(kEntries);
    t.conv_max_pool2d_backward =
        adapt<ConvMaxPool2dBackwardParams, &cuda::KernelTable::conv_max_pool2d_backward>(kEntries);
    t.bias_act_dropout_forward = pyconv::bias_act_dropout_forward;
    t.bias_act_dropout_backward = pyconv::bias_act_dropout_backward;
    return t;
  }();
  return &table;
}

// For tests of one kernel on shapes that another would take: of each list only the entry of this name accepts, and the
// last takes what it refuses. An empty name: the order of the lists, as in a build for CUDA.
void pyconv_emulation_prefer(const char* name) { pyconv::preferred() = name; }
}
