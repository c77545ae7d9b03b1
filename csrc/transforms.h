// What an Autograd kernel must ask before it may call a raw kernel, whose derivatives autograd cannot see.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace pyconv {

// Whether a torch.func transform (grad, vmap, jvp, ...) is running. ATen/functorch/DynamicLayer.h would say so too,
// but the wheel lacks a header it includes.
inline bool transform_is_active() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         included.has(c10::DispatchKey::FuncTorchVmapMode);
}

// Whether t is a dual tensor of forward-mode AD.
inline bool has_tangent(const at::Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }

}  // namespace pyconv
