// The table of AVX512_BF16: what that instruction set adds, in front of AVX-512's own kernels.
#include "isa_kernels.h"

namespace pyconv::cpu {

const KernelTable& kernel_table_avx512();

namespace {

template <class Params>
KernelList<Params> joined(const KernelList<Params>& first, const KernelList<Params>& rest) {
  auto* entries = new Kernel<Params>[static_cast<size_t>(first.count + rest.count)];  // stays, as the table does
  for (int i = 0; i < first.count; ++i) entries[i] = first.entries[i];
  for (int i = 0; i < rest.count; ++i) entries[first.count + i] = rest.entries[i];
  return {entries, first.count + rest.count};
}

KernelTable joined_table() {
  KernelTable table = kernel_table_avx512();
  table.isa = "avx512_bf16";
  table.conv_max_pool2d_forward =
      joined(PYCONV_ISA_NAMESPACE::conv_max_pool2d_forward_kernels(), table.conv_max_pool2d_forward);
  table.conv_max_pool2d_backward =
      joined(PYCONV_ISA_NAMESPACE::conv_max_pool2d_backward_kernels(), table.conv_max_pool2d_backward);
  return table;
}

}  // namespace

const KernelTable& kernel_table_avx512_bf16() {
  static const KernelTable table = joined_table();
  return table;
}

}  // namespace pyconv::cpu
