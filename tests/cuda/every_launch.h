// Calls every launcher of the CUDA kernels that accepts, for geometries read from standard input, with every dtype,
// layout and alignment. The pointers are made up: for programs in which no kernel runs.
#pragma once

#include <cstdint>
#include <iostream>
#include <vector>

#include "../../cuda/kernel_table.h"

namespace pyconv::tests {

// One geometry a line: the members of ConvMaxPool2dGeometry in their order, without the activation.
inline std::vector<ConvMaxPool2dGeometry> read_geometries() {
  std::vector<ConvMaxPool2dGeometry> geometries;
  ConvMaxPool2dGeometry g = {};
  while (std::cin >> g.N >> g.C >> g.H >> g.W >> g.K >> g.R >> g.S >> g.groups >> g.stride_h >> g.stride_w >>
         g.pad_top >> g.pad_left >> g.dilation_h >> g.dilation_w >> g.OH >> g.OW >> g.pool_h >> g.pool_w >>
         g.pool_stride_h >> g.pool_stride_w >> g.pool_pad_h >> g.pool_pad_w >> g.pool_dilation_h >>
         g.pool_dilation_w >> g.PH >> g.PW) {
    geometries.push_back(g);
  }
  return geometries;
}

inline void* address(int number, int64_t misalignment) {
  return reinterpret_cast<void*>((int64_t{number} << 40) + misalignment);
}

inline int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

inline Strides4 contiguous(int64_t c, int64_t h, int64_t w) { return {c * h * w, h * w, w, 1}; }
inline Strides4 channels_last(int64_t c, int64_t h, int64_t w) { return {c * h * w, 1, w * c, c}; }

// visit(list, entry, error) after each launch.
template <class Visit>
class EveryLaunch {
 public:
  EveryLaunch(const cuda::KernelTable& table, Visit visit) : table_(table), visit_(visit) {}

  void run(const std::vector<ConvMaxPool2dGeometry>& geometries) {
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
      for (int64_t misalignment : {int64_t{0}, element_size(dtype)}) {
        for (const ConvMaxPool2dGeometry& geometry : geometries) {
          for (bool nhwc : {false, true}) {
            for (bool tf32 : {false, true}) convolutions(geometry, dtype, misalignment, nhwc, tf32);
          }
        }
        for (int64_t columns : {1, 10, 1024}) dropouts(columns, dtype, misalignment);
      }
    }
    visit_("dropout_state", "", table_.dropout_state({}, static_cast<int64_t*>(address(1, 0)), nullptr));
  }

 private:
  void convolutions(const ConvMaxPool2dGeometry& g, DType dtype, int64_t misalignment, bool nhwc, bool tf32) {
    const auto strides = [&](int64_t c, int64_t h, int64_t w) {
      return nhwc ? channels_last(c, h, w) : contiguous(c, h, w);
    };
    ConvMaxPool2dForwardParams forward = {};
    forward.geometry = g;
    forward.dtype = dtype;
    forward.input = address(1, misalignment);
    forward.weight = address(2, misalignment);
    forward.bias = address(3, misalignment);
    forward.bias_stride = 1;
    forward.output = address(4, misalignment);
    forward.argmax = address(5, 0);
    forward.workspace = address(6, 0);
    forward.input_strides = strides(g.C, g.H, g.W);
    forward.weight_strides = strides(g.C / g.groups, g.R, g.S);
    forward.output_strides = strides(g.K, g.PH, g.PW);
    forward.allow_tf32 = tf32;
    launch("conv_max_pool2d_forward", table_.conv_max_pool2d_forward, forward);
    forward.argmax = nullptr;
    launch("conv_max_pool2d_forward", table_.conv_max_pool2d_forward, forward);

    ConvMaxPool2dBackwardParams backward = {};
    backward.geometry = g;
    backward.dtype = dtype;
    backward.grad_output = address(1, misalignment);
    backward.argmax = address(2, 0);
    backward.input = address(3, misalignment);
    backward.weight = address(4, misalignment);
    backward.grad_input = address(5, misalignment);
    backward.grad_weight = address(6, misalignment);
    backward.grad_bias = address(7, misalignment);
    backward.workspace = address(8, 0);
    backward.output_strides = forward.output_strides;
    backward.input_strides = backward.grad_input_strides = forward.input_strides;
    backward.weight_strides = backward.grad_weight_strides = forward.weight_strides;
    backward.allow_tf32 = tf32;
    launch("conv_max_pool2d_backward", table_.conv_max_pool2d_backward, backward);
    backward.geometry.activation = Activation::sigmoid;
    backward.saved = address(9, misalignment);
    launch("conv_max_pool2d_backward", table_.conv_max_pool2d_backward, backward);
    backward.grad_weight = nullptr;
    launch("conv_max_pool2d_backward", table_.conv_max_pool2d_backward, backward);
    backward.grad_bias = nullptr;
    launch("conv_max_pool2d_backward", table_.conv_max_pool2d_backward, backward);
  }

  void dropouts(int64_t columns, DType dtype, int64_t misalignment) {
    for (Activation activation : {Activation::none, Activation::relu, Activation::gelu}) {
      for (bool bias : {false, true}) {
        BiasActDropoutForwardParams forward = {};
        forward.rows = 512;
        forward.columns = columns;
        forward.dtype = dtype;
        forward.activation = activation;
        forward.input = address(1, misalignment);
        forward.bias = bias ? address(2, misalignment) : nullptr;
        forward.output = address(3, misalignment);
        forward.drop = true;
        forward.p = 0.5;
        forward.scale = 2;
        visit_("bias_act_dropout_forward", "", table_.bias_act_dropout_forward(forward, nullptr));

        BiasActDropoutBackwardParams backward = {};
        backward.rows = 512;
        backward.columns = columns;
        backward.dtype = dtype;
        backward.activation = activation;
        backward.grad_output = address(1, misalignment);
        backward.saved = activation == Activation::none ? nullptr : address(2, misalignment);
        backward.grad_input = address(3, misalignment);
        backward.grad_bias = bias ? address(4, misalignment) : nullptr;
        backward.drop = true;
        backward.p = 0.5;
        backward.scale = 2;
        backward.workspace = address(5, 0);
        visit_("bias_act_dropout_backward", "", table_.bias_act_dropout_backward(backward, nullptr));
      }
    }
  }

  template <class Params>
  void launch(const char* list, const cuda::KernelList<Params>& kernels, const Params& params) {
    for (int i = 0; i < kernels.count; ++i) {
      const cuda::Kernel<Params>& entry = kernels.entries[i];
      if (entry.accepts(params)) visit_(list, entry.name, entry.launch(params, nullptr));
    }
  }

  const cuda::KernelTable& table_;
  Visit visit_;
};

}  // namespace pyconv::tests
