// An operator that does nothing, with the inputs, outputs and saved tensors of pyconv::conv_max_pool2d:
//   x (N, C, H, W), w (K, C, R, S), b (K) -> y (N, K, PH, PW), saving x, w and argmax (N, K, PH, PW) u8.
// What it costs is what PyTorch charges for any operator of this form; the rest of conv_max_pool2d's time on
// a tiny input is pyconv's own overhead.

#include <torch/extension.h>
#include <torch/library.h>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor forward_no_autograd(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b,
                               at::IntArrayRef shape) {
    return at::empty(shape, x.options());
}

struct Noop : torch::autograd::Function<Noop> {
    static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w,
                              const at::Tensor& b, at::IntArrayRef shape) {
        at::Tensor y = at::empty(shape, x.options());
        ctx->save_for_backward({x, w, at::empty(shape, x.options().dtype(at::kByte))});
        return y;
    }

    static variable_list backward(AutogradContext* ctx, variable_list) {
        const variable_list saved = ctx->get_saved_variables();
        const at::Tensor &x = saved[0], &w = saved[1];
        return {at::empty_like(x), at::empty_like(w), at::empty({w.size(0)}, w.options()), at::Tensor()};
    }
};

at::Tensor forward_autograd(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b,
                            at::IntArrayRef shape) {
    return Noop::apply(x, w, b, shape);
}

}  // namespace

TORCH_LIBRARY(pyconv_benchmarks, library) {
    library.def("noop(Tensor x, Tensor w, Tensor b, int[] shape) -> Tensor");
    library.impl("noop", c10::DispatchKey::CompositeExplicitAutograd, forward_no_autograd);
    library.impl("noop", c10::DispatchKey::Autograd, forward_autograd);
}
