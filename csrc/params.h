// The contract between the doors (which know torch) and the kernels (which do not): plain structs.
// Sizes, strides and offsets are int64 and count elements, never bytes, unless a name says so.
#pragma once

#include <cstdint>

namespace pyconv {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

enum class Activation : int32_t { none, relu, sigmoid, tanh, gelu, silu };

// Bit patterns of the 16-bit formats; kernels widen them to float before any arithmetic.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// How a kernel runs in parallel. The door fills it from torch's pool; a C++ test from std::thread or serially.
// Kernels never ask a runtime for the number of threads and never open a region inside a region.
struct Threads {
  int64_t num_threads;
  // Calls body on disjoint ranges that cover [begin, end); returns when all have ended.
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);
};

struct Strides4 {
  int64_t n, c, h, w;
};

// Geometry of y = activation(max_pool2d(conv2d(x, w)) + b):
// x (N,C,H,W) -> conv (N,K,OH,OW) -> window max -> y (N,K,PH,PW).
struct ConvMaxPool2dGeometry {
  int64_t N, C, H, W;
  int64_t K, R, S;  // weight (K, C/groups, R, S)
  int64_t groups;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;  // the far sides follow from OH and OW
  int64_t dilation_h, dilation_w;
  int64_t OH, OW;
  int64_t pool_h, pool_w;
  int64_t pool_stride_h, pool_stride_w;
  int64_t pool_pad_h, pool_pad_w;
  int64_t pool_dilation_h, pool_dilation_w;
  int64_t PH, PW;
  Activation activation;
};

// An argmax is the window-relative row-major position i * pool_w + j of the chosen convolution output. It is
// one byte, or int32 where a window has more than 255 positions.
constexpr int32_t kNoGradientByte = 255;
constexpr int32_t kNoGradientInt32 = -1;
constexpr int64_t kMaxByteWindow = 255;

inline bool argmax_is_byte(const ConvMaxPool2dGeometry& g) { return g.pool_h * g.pool_w <= kMaxByteWindow; }

struct ConvMaxPool2dForwardParams {
  ConvMaxPool2dGeometry geometry;
  DType dtype;
  const void* input;  // (N, C, H, W), any strides
  Strides4 input_strides;
  const void* weight;  // (K, C/groups, R, S), any strides
  Strides4 weight_strides;
  const void* bias;  // (K,) or null
  int64_t bias_stride;
  void* output;  // (N, K, PH, PW), dense, NCHW or NHWC in memory
  Strides4 output_strides;
  void* argmax;          // uint8 or int32, strides of output; null at inference
  void* pre_activation;  // dtype and strides of output; null unless gelu or silu is trained
  void* workspace;       // workspace_bytes() of the kernel, aligned to 64 bytes
  bool allow_tf32;       // CUDA: float32 operands may be rounded to TF32 before they are multiplied
  Threads threads;       // CPU
};

struct ConvMaxPool2dBackwardParams {
  ConvMaxPool2dGeometry geometry;
  DType dtype;
  const void* grad_output;  // (N, K, PH, PW), strides of argmax
  const void* argmax;       // (N, K, PH, PW), dense, NCHW or NHWC in memory
  const void* saved;        // dtype and strides of argmax: the output (sigmoid, tanh), the pre-activation
                            // (gelu, silu), null (none, relu)
  Strides4 output_strides;
  const void* input;  // (N, C, H, W), any strides; read only for grad_weight
  Strides4 input_strides;
  const void* weight;  // (K, C/groups, R, S), any strides; read only for grad_input
  Strides4 weight_strides;
  void* grad_input;  // (N, C, H, W), dense, or null where not wanted; every element is written
  Strides4 grad_input_strides;
  void* grad_weight;  // (K, C/groups, R, S), dense, or null where not wanted; every element is written
  Strides4 grad_weight_strides;
  void* grad_bias;  // (K,), contiguous, or null where not wanted
  void* workspace;  // workspace_bytes() of the kernel, aligned to 64 bytes
  bool allow_tf32;  // CUDA: float32 operands may be rounded to TF32 before they are multiplied
  Threads threads;  // CPU
};

// output = dropout(activation(input + bias)); element i in logical (row-major) order. Mask: see philox.h.
struct BiasActDropoutForwardParams {
  int64_t rows, columns;  // input (rows, columns), contiguous; bias along the columns
  DType dtype;
  Activation activation;
  const void* input;
  const void* bias;      // (columns,) contiguous, or null
  void* output;          // (rows, columns), contiguous
  void* pre_activation;  // dtype and shape of output; null unless gelu or silu is trained
  bool drop;             // false: no mask is applied
  double p;              // probability of an element to be dropped
  double scale;          // factor of a kept element (and of every element where drop is false)
  uint64_t seed, offset;
  const int64_t* state;  // CUDA: (seed, offset) in device memory, instead of the two above; or null
  Threads threads;       // CPU
};

// grad_input = grad_output * mask * scale * activation'; the bias gradient is the sum of grad_input over the rows.
struct BiasActDropoutBackwardParams {
  int64_t rows, columns;
  DType dtype;
  Activation activation;
  const void* grad_output;  // (rows, columns), contiguous
  const void* saved;        // the output (relu, sigmoid, tanh) or the pre-activation (gelu, silu); null for none
  void* grad_input;         // (rows, columns), contiguous
  void* grad_bias;          // (columns,), contiguous, or null where not wanted
  bool drop;
  double p;
  double scale;
  uint64_t seed, offset;
  const int64_t* state;  // CUDA: (seed, offset) in device memory, instead of the two above; or null
  void* workspace;       // CUDA: workspace_bytes() of the kernel, aligned to 64 bytes
  Threads threads;       // CPU
};

// Random geometric distortions of images. Which one an image gets, and the layout of the random numbers: see
// docs/design.md, "Augmentation". Where nothing but crop and flip is asked for, pixels are copied.
struct RandomDistortionParams {
  int64_t N, C, H, W;  // images
  int64_t output_h, output_w;
  DType dtype;
  const void* images;        // (N, C, H, W), contiguous
  void* output;              // (N, C, output_h, output_w), contiguous; may be `images` where the sizes are the same
  const int64_t* positions;  // (N,): of the images in the data, not negative
  uint64_t seed;
  uint32_t epoch;
  // The most either way, 0 for none:
  double shift_h, shift_w;  // pixels
  double rotation;          // radians
  double scale;             // relative, of each axis; below 1
  double shear;             // pixels sideways for each pixel downwards
  double elastic;           // factor of the smoothed displacements, pixels
  const double* smoothing;  // (radius + 1,): the Gaussian from its middle on, which with its other half sums to 1
  int64_t radius;
  int64_t padding;  // zeros around the image before it is cropped to the output
  double flip;      // probability of a mirror image
  void* workspace;  // random_distortion_workspace_bytes(), aligned to 64 bytes
  Threads threads;

  bool crops() const { return output_h != H + 2 * padding || output_w != W + 2 * padding; }
  // Whether the pixels of an output lie between those of its image.
  bool interpolates() const { return is_affine() || elastic != 0; }
  bool is_affine() const { return shift_h != 0 || shift_w != 0 || rotation != 0 || scale != 0 || shear != 0; }
};

// ---- The compiled network ------------------------------------------------------------------------------------

// A step of stochastic gradient descent, as torch.optim.SGD takes it, for a parameter w, its gradient g and, with
// momentum, its buffer v:
//   g' = g + decay * w;   v = momentum * v + (1 - dampening) * g', or g' in the first step
//   w -= rate * (g' without momentum; v; g' + momentum * v if nesterov)
struct SgdStep {
  double rate, decay, momentum, dampening;
  bool nesterov;
  bool first;  // v holds nothing yet
};

// The matrix (rows, columns), contiguous, of a fully connected layer. Its inputs lie along the rows (network3's w) or
// along the columns (nn.Linear's weight).
struct DenseGeometry {
  int64_t N, rows, columns;
  bool inputs_are_rows;

  int64_t inputs() const { return inputs_are_rows ? rows : columns; }
  int64_t outputs() const { return inputs_are_rows ? columns : rows; }
};

// output = input * matrix (inputs, outputs)
struct DenseForwardParams {
  DenseGeometry geometry;
  DType dtype;
  const void* matrix;
  const void* input;  // (N, inputs), contiguous
  void* output;       // (N, outputs), contiguous
  void* workspace;    // dense_forward_workspace_bytes(), aligned to 64 bytes
  Threads threads;
};

// grad_input = grad_output * matrix^T; then a step of the matrix, whose gradient input^T * grad_output is never in
// memory.
struct DenseBackwardParams {
  DenseGeometry geometry;
  DType dtype;
  const void* input;        // (N, inputs), contiguous
  const void* grad_output;  // (N, outputs), contiguous
  void* grad_input;         // (N, inputs), contiguous; or null where not wanted
  bool input_zero_is_dead;  // where the input is 0, nobody asks for its gradient: it may be 0
  void* matrix;
  bool update;              // else the matrix stays as it is
  void* momentum_buffer;    // (rows, columns), contiguous; null without momentum
  SgdStep step;
  double* squares;  // the sum of the squares of the new matrix; or null where not wanted
  void* workspace;  // dense_backward_workspace_bytes(), aligned to 64 bytes
  Threads threads;
};

// A step of a parameter whose gradient is in memory.
struct SgdUpdateParams {
  int64_t count;
  DType dtype;
  void* parameter;
  const void* gradient;
  void* momentum_buffer;  // null without momentum
  SgdStep step;
  double* squares;  // the sum of the squares of the new parameter; or null where not wanted
  Threads threads;
};

// The mean over N of log(sum(exp(logits))) - logits[label], and its gradient.
struct SoftmaxCrossEntropyParams {
  int64_t N, classes;
  DType dtype;
  const void* logits;     // (N, classes), contiguous
  const int64_t* labels;  // (N,), from 0 to classes - 1
  void* grad_logits;      // (N, classes), contiguous
  double* loss;
  void* workspace;  // softmax_cross_entropy_workspace_bytes(), aligned to 64 bytes
};

}  // namespace pyconv
