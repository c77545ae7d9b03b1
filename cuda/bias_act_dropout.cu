// Dropout, alone or behind bias and activation, forward and backward, in one pass over the data; csrc/philox.h defines
// the masks.
//
//   forward   input (rows, columns) -> + bias (columns) -> activation -> * scale or 0 -> output (rows, columns)
//   backward  grad_output (rows, columns) -> * scale or 0 -> * activation' -> grad_input (rows, columns);
//             its sums over chunks of rows (chunks, columns) -> grad_bias (columns)
//   state     torch's Philox state -> (seed, offset) in device memory
//
// A thread works on vectors of 16 bytes and draws their random bits itself, also where 8-bit draws make up to 8 threads
// compute the same Philox block: memory takes longer. A block is about 50 instructions, so that a vector costs 80
// (float32) to 165 (16-bit types with 32-bit draws), all told: at 128 instructions a cycle, 0.6 to 1.3 cycles of a
// multiprocessor. Read and written at 4.3 TB/s, shared by 132 multiprocessors of 1.8 GHz, a vector takes 1.8.
#include "activations.cuh"
#include "device.cuh"
#include "dropout_mask.cuh"
#include "kernels.h"

namespace pyconv::cuda {

// ---- What the kernels take ----------------------------------------------------------------------------------

constexpr int kVectorBytes = 16;
constexpr int kForwardThreads = 256, kBackwardThreads = 128;

template <class T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

// Smooth activations share a kernel, which branches once a vector: they compute more than they move.
enum class ActivationFamily : int32_t { none, relu, smooth };

constexpr ActivationFamily family_of(Activation activation) {
  return activation == Activation::none   ? ActivationFamily::none
         : activation == Activation::relu ? ActivationFamily::relu
                                          : ActivationFamily::smooth;
}

// Vectors of each tensor that a thread has under way at once. At 4.3 TB/s and a latency of 700 ns, 23 KB must be under
// way on each of 132 multiprocessors: 48 KB in the forward, 32 KB in the backward (half without an activation, which
// reads one tensor less). Where the activation is smooth, arithmetic takes the time.
template <ActivationFamily family>
constexpr int kForwardVectors = family == ActivationFamily::smooth ? 2 : 4;
template <ActivationFamily family>
constexpr int kBackwardVectors = family == ActivationFamily::smooth ? 1 : 2;

// Blocks that a multiprocessor must hold: at most 80 and 128 registers a thread, or 128 and 168 where it is smooth.
template <ActivationFamily family>
constexpr int kForwardBlocks = family == ActivationFamily::smooth ? 2 : 3;
template <ActivationFamily family>
constexpr int kBackwardBlocks = family == ActivationFamily::smooth ? 3 : 4;

template <class T>
struct DropoutForwardArguments {
  const T* input;
  const T* bias;  // or null
  T* output;
  T* pre_activation;  // or null
  int64_t count, columns;
  Activation activation;
  Accumulator<T> scale;
  DropoutMask mask;
  bool vectors;       // input, output and pre_activation begin at multiples of 16 bytes
  bool bias_vectors;  // so do the bias and, in it, every vector
};

template <class T>
struct DropoutBackwardArguments {
  const T* grad_output;
  const T* saved;  // or null
  T* grad_input;
  T* grad_bias;             // (columns,) where there is one chunk; or null
  Accumulator<T>* partial;  // (chunks, columns), or null
  int64_t count, columns;
  int64_t rows, rows_per_chunk;  // the latter within 32 bits
  int64_t strips;                // of columns, 16 bytes * 2^log2_lanes wide
  int log2_lanes;
  Activation activation;
  Accumulator<T> scale, inverse_scale;
  DropoutMask mask;
  bool vectors;        // grad_output, saved and grad_input begin at multiples of 16 bytes, and so does every row
  bool whole_vectors;  // in a row: every vector begins at a multiple of its elements
};

namespace {

// ---- Vectors ------------------------------------------------------------------------------------------------

template <class T>
struct alignas(kVectorBytes) Vector {
  T element[kVectorElements<T>];
};

// The elements at `from`, of which only the first `available`, perhaps none, are there.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* from, int64_t available, bool whole) {
  if (whole) return *reinterpret_cast<const Vector<T>*>(from);
  Vector<T> to = {};
#pragma unroll
  for (int v = 0; v < kVectorElements<T>; ++v) {
    if (v < available) to.element[v] = from[v];
  }
  return to;
}

template <class T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T>& from, int64_t available, bool whole) {
  if (whole) {
    *reinterpret_cast<Vector<T>*>(to) = from;
    return;
  }
#pragma unroll
  for (int v = 0; v < kVectorElements<T>; ++v) {
    if (v < available) to[v] = from.element[v];
  }
}

// ---- Activations --------------------------------------------------------------------------------------------

// What the compiler can know of the activation in a kernel of this family.
template <ActivationFamily family>
__device__ __forceinline__ Activation known_activation(Activation activation) {
  if (family == ActivationFamily::none) return Activation::none;
  if (family == ActivationFamily::relu) return Activation::relu;
  return activation;
}

template <Activation activation>
struct ActivationConstant {
  static constexpr Activation value = activation;
};

// action(ActivationConstant<activation>())
template <class Action>
__device__ __forceinline__ void with_activation(Activation activation, const Action& action) {
  switch (activation) {
    case Activation::none:
      return action(ActivationConstant<Activation::none>());
    case Activation::relu:
      return action(ActivationConstant<Activation::relu>());
    case Activation::sigmoid:
      return action(ActivationConstant<Activation::sigmoid>());
    case Activation::tanh:
      return action(ActivationConstant<Activation::tanh>());
    case Activation::gelu:
      return action(ActivationConstant<Activation::gelu>());
    case Activation::silu:
      return action(ActivationConstant<Activation::silu>());
  }
}

// gradient * activation', where `gradient` is already multiplied by the dropout factor. The saved output of a kept
// element is scale * activation(x); that of a dropped one says nothing, and its gradient stays what it is: 0, or NaN
// from a non-finite grad_output. Rounding may have carried an output past the range of the activation.
template <Activation activation, class A>
__device__ __forceinline__ A through_activation(A gradient, A saved, A inverse_scale, bool kept) {
  if (activation == Activation::none) return gradient;
  if (activation == Activation::relu) return kept && saved <= A(0) ? A(0) : gradient;
  if (activation == Activation::sigmoid) {
    const A y = saved * inverse_scale;
    return gradient * activation_derivative(activation, y > A(1) ? A(1) : y);
  }
  if (activation == Activation::tanh) {
    const A y = saved * inverse_scale, square = y * y;
    return gradient * (A(1) - (square > A(1) ? A(1) : square));
  }
  return gradient * activation_derivative(activation, saved);
}

}  // namespace

// ---- Kernels ------------------------------------------------------------------------------------------------

template <class T, ActivationFamily family>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<family>)
    bias_act_dropout_forward_kernel(DropoutForwardArguments<T> a) {
  using A = Accumulator<T>;
  constexpr int vectors = kForwardVectors<family>;
  constexpr int width = kVectorElements<T>;
  constexpr int step = kForwardThreads * width;
  constexpr int tile = vectors * step;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile;
  const int64_t first = begin + threadIdx.x * width;
  const bool whole = a.vectors && begin + tile <= a.count;

  Vector<T> x[vectors];
#pragma unroll
  for (int u = 0; u < vectors; ++u) {
    const int64_t index = first + u * step;
    x[u] = load_vector(a.input + index, a.count - index, whole);
  }
  uint32_t kept[vectors];
  draw_kept<width>(a.mask, key_of(a.mask), first, step, kept);
  const int64_t first_column = a.bias == nullptr ? 0 : begin % a.columns;

#pragma unroll
  for (int u = 0; u < vectors; ++u) {
    const int64_t index = first + u * step;
    A value[width];
#pragma unroll
    for (int v = 0; v < width; ++v) value[v] = widen(x[u].element[v]);
    if (a.bias != nullptr) {
      int64_t column = first_column + (index - begin);  // below columns + tile
      if (a.columns < tile) {
        column = static_cast<uint32_t>(column) % static_cast<uint32_t>(a.columns);
      } else if (column >= a.columns) {
        column -= a.columns;
      }
      if (a.bias_vectors) {
        const Vector<T> bias = load_vector(a.bias + column, width, true);
#pragma unroll
        for (int v = 0; v < width; ++v) value[v] += widen(bias.element[v]);
      } else {
#pragma unroll
        for (int v = 0; v < width; ++v) {
          value[v] += widen(a.bias[column]);
          column = column + 1 == a.columns ? 0 : column + 1;
        }
      }
    }
    if (a.pre_activation != nullptr) {
      Vector<T> pre_activation;
#pragma unroll
      for (int v = 0; v < width; ++v) pre_activation.element[v] = narrow<T>(value[v]);
      store_vector(a.pre_activation + index, pre_activation, a.count - index, whole);
    }
    with_activation(known_activation<family>(a.activation), [&](auto constant) {
#pragma unroll
      for (int v = 0; v < width; ++v) value[v] = activate(decltype(constant)::value, value[v]);
    });
    Vector<T> output;
#pragma unroll
    for (int v = 0; v < width; ++v) {
      output.element[v] = narrow<T>(value[v] * ((kept[u] >> v & 1) != 0 ? a.scale : A(0)));
    }
    store_vector(a.output + index, output, a.count - index, whole);
  }
}

template <class A, int Elements>
struct DropoutBackwardShared {
  A sums[kBackwardThreads][Elements];
};

// A block takes one strip of columns and one chunk of rows; a thread some columns and every so-many-th row.
template <class T, ActivationFamily family>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<family>)
    bias_act_dropout_backward_kernel(DropoutBackwardArguments<T> a) {
  using A = Accumulator<T>;
  constexpr int vectors = kBackwardVectors<family>;
  constexpr int width = kVectorElements<T>;
  const int lanes = 1 << a.log2_lanes, rows_at_once = kBackwardThreads >> a.log2_lanes;
  const int thread_row = static_cast<int>(threadIdx.x) >> a.log2_lanes;
  const int64_t chunk = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const int64_t column = (strip * lanes + (threadIdx.x & (lanes - 1))) * width;
  const int64_t first_row = chunk * a.rows_per_chunk;
  const int rows = static_cast<int>(min(a.rows - first_row, a.rows_per_chunk));
  const int columns = static_cast<int>(min(a.columns - column, static_cast<int64_t>(width)));  // not positive: none
  const int64_t step = rows_at_once * a.columns;
  const DropoutKey key = key_of(a.mask);

  A sums[width] = {};
  int64_t first = (first_row + thread_row) * a.columns + column;
  for (int row = thread_row; row < rows && columns > 0;
       row += vectors * rows_at_once, first += vectors * step) {
    Vector<T> gradient[vectors], saved[vectors];
    int available[vectors];
#pragma unroll
    for (int u = 0; u < vectors; ++u) {
      const int64_t index = first + u * step;
      available[u] = row + u * rows_at_once < rows ? columns : 0;
      if (index + available[u] > a.count) available[u] = static_cast<int>(a.count - index);
      const bool whole = a.vectors && available[u] == width;
      gradient[u] = load_vector(a.grad_output + index, available[u], whole);
      if (family != ActivationFamily::none) saved[u] = load_vector(a.saved + index, available[u], whole);
    }
    uint32_t kept[vectors];
    if (a.whole_vectors) {
      draw_kept<width>(a.mask, key, first, step, kept);
    } else {
#pragma unroll
      for (int u = 0; u < vectors; ++u) kept[u] = draw_kept_anywhere<width>(a.mask, key, first + u * step);
    }
#pragma unroll
    for (int u = 0; u < vectors; ++u) {
      A g[width];
#pragma unroll
      for (int v = 0; v < width; ++v) {
        g[v] = widen(gradient[u].element[v]) * ((kept[u] >> v & 1) != 0 ? a.scale : A(0));
      }
      with_activation(known_activation<family>(a.activation), [&](auto constant) {
        if constexpr (decltype(constant)::value != Activation::none) {
#pragma unroll
          for (int v = 0; v < width; ++v) {
            g[v] = through_activation<decltype(constant)::value>(g[v], A(widen(saved[u].element[v])), a.inverse_scale,
                                                                 (kept[u] >> v & 1) != 0);
          }
        }
      });
      Vector<T> result;
#pragma unroll
      for (int v = 0; v < width; ++v) {
        result.element[v] = narrow<T>(g[v]);
        sums[v] += g[v];  // 0 where no element is
      }
      store_vector(a.grad_input + (first + u * step), result, available[u], a.vectors && available[u] == width);
    }
  }
  if (a.partial == nullptr && a.grad_bias == nullptr) return;

  auto& shared = shared_memory<DropoutBackwardShared<A, width>>();
#pragma unroll
  for (int v = 0; v < width; ++v) shared.sums[threadIdx.x][v] = sums[v];
  for (int half = rows_at_once / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread_row < half) {
#pragma unroll
      for (int v = 0; v < width; ++v) {
        shared.sums[threadIdx.x][v] += shared.sums[threadIdx.x + half * lanes][v];
      }
    }
  }
  if (thread_row != 0) return;
#pragma unroll
  for (int v = 0; v < width; ++v) {
    if (column + v >= a.columns) continue;
    if (a.partial != nullptr) {
      a.partial[chunk * a.columns + column + v] = shared.sums[threadIdx.x][v];
    } else {
      a.grad_bias[column + v] = narrow<T>(shared.sums[threadIdx.x][v]);
    }
  }
}

constexpr int kSumColumns = 32, kSumRows = 32;

template <class A>
struct DropoutSumShared {
  A sums[kSumRows][kSumColumns];
};

// partial (chunks, columns) -> grad_bias (columns)
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    bias_act_dropout_sum_kernel(const Accumulator<T>* partial, T* grad_bias, int64_t chunks, int64_t columns) {
  using A = Accumulator<T>;
  const int x = static_cast<int>(threadIdx.x) % kSumColumns, y = static_cast<int>(threadIdx.x) / kSumColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + x;
  auto& shared = shared_memory<DropoutSumShared<A>>();
  A sum = 0;
  if (column < columns) {
    for (int64_t chunk = y; chunk < chunks; chunk += kSumRows) sum += partial[chunk * columns + column];
  }
  shared.sums[y][x] = sum;
  for (int half = kSumRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (y < half) shared.sums[y][x] += shared.sums[y + half][x];
  }
  if (y == 0 && column < columns) grad_bias[column] = narrow<T>(shared.sums[0][x]);
}

__global__ void __launch_bounds__(1) dropout_state_kernel(PhiloxState philox, int64_t* state) {
  const bool captured = philox.seed_pointer != nullptr;
  const uint64_t seed = captured ? static_cast<uint64_t>(*philox.seed_pointer) : philox.seed;
  const uint64_t offset =
      captured ? static_cast<uint64_t>(*philox.offset_pointer) + philox.offset_in_graph : philox.offset;
  state[0] = static_cast<int64_t>(seed);
  state[1] = static_cast<int64_t>(offset);
}

// ---- Launchers ----------------------------------------------------------------------------------------------

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool starts_a_vector(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

template <ActivationFamily family>
struct FamilyConstant {
  static constexpr ActivationFamily value = family;
};

// action(FamilyConstant<family of the activation>())
template <class Action>
int with_family(Activation activation, const Action& action) {
  switch (family_of(activation)) {
    case ActivationFamily::relu:
      return action(FamilyConstant<ActivationFamily::relu>());
    case ActivationFamily::smooth:
      return action(FamilyConstant<ActivationFamily::smooth>());
    case ActivationFamily::none:
      break;
  }
  return action(FamilyConstant<ActivationFamily::none>());
}

template <class T>
int launch_forward(const BiasActDropoutForwardParams& params, Stream stream) {
  DropoutForwardArguments<T> a = {};
  a.input = static_cast<const T*>(params.input);
  a.bias = static_cast<const T*>(params.bias);
  a.output = static_cast<T*>(params.output);
  a.pre_activation = static_cast<T*>(params.pre_activation);
  a.count = params.rows * params.columns;
  a.columns = params.columns;
  a.activation = params.activation;
  a.scale = static_cast<Accumulator<T>>(params.scale);
  a.mask = mask_of(params);
  a.vectors = starts_a_vector(a.input) && starts_a_vector(a.output) && starts_a_vector(a.pre_activation);
  a.bias_vectors = starts_a_vector(a.bias) && a.columns % kVectorElements<T> == 0;
  if (a.count == 0) return 0;
  return with_family(params.activation, [&](auto constant) {
    constexpr ActivationFamily family = decltype(constant)::value;
    constexpr int64_t tile = int64_t(kForwardThreads) * kForwardVectors<family> * kVectorElements<T>;
    const dim3 grid(static_cast<unsigned>(divide_up(a.count, tile)));
    return launch(bias_act_dropout_forward_kernel<T, family>, grid, dim3(kForwardThreads), 0, stream, a);
  });
}

// How the backward's rows and columns are split: by their number and type alone, so that sums have one order.
struct BackwardPlan {
  int64_t rows, columns;  // where no sums are wanted, of any shape that holds all elements, its last row perhaps partly
  int64_t strips, chunks, rows_per_chunk;
  int log2_lanes;
};

// Blocks of one pass over the data: about as many as a large GPU holds at once. More would only give more sums to add.
constexpr int64_t kSumBlocks = 1024;
// Shorter chunks, in rows of a thread, do not repay a second kernel.
constexpr int64_t kMinRowsPerThread = 8;
// Without sums a block is short, so that many of them balance each other.
constexpr int64_t kRowsPerThread = 4;
constexpr int kMaxLog2Lanes = 5;

BackwardPlan backward_plan(const BiasActDropoutBackwardParams& params, int64_t vector_elements) {
  BackwardPlan plan = {params.rows, params.columns, 1, 1, 1, kMaxLog2Lanes};
  const auto rows_at_once = [&] { return int64_t(kBackwardThreads >> plan.log2_lanes); };
  if (params.grad_bias == nullptr) {
    plan.columns = vector_elements << kMaxLog2Lanes;
    plan.rows = divide_up(params.rows * params.columns, plan.columns);
    plan.rows_per_chunk = kRowsPerThread * rows_at_once();
    plan.chunks = divide_up(plan.rows, plan.rows_per_chunk);
    return plan;
  }
  const int64_t vectors = divide_up(plan.columns, vector_elements);
  while (plan.log2_lanes > 0 && (int64_t(1) << (plan.log2_lanes - 1)) >= vectors) --plan.log2_lanes;
  plan.strips = divide_up(vectors, int64_t(1) << plan.log2_lanes);
  const int64_t most_chunks = divide_up(plan.rows, kMinRowsPerThread * rows_at_once());
  const int64_t wanted_chunks = divide_up(kSumBlocks, plan.strips > 0 ? plan.strips : 1);
  const int64_t chunks = wanted_chunks < most_chunks ? wanted_chunks : most_chunks;
  plan.rows_per_chunk = divide_up(plan.rows, chunks > 0 ? chunks : 1);
  plan.chunks = plan.rows == 0 ? 0 : divide_up(plan.rows, plan.rows_per_chunk);
  return plan;
}

template <class T>
int64_t backward_workspace_bytes(const BiasActDropoutBackwardParams& params) {
  if (params.grad_bias == nullptr) return 0;
  const BackwardPlan plan = backward_plan(params, kVectorElements<T>);
  return plan.chunks == 1 ? 0 : plan.chunks * plan.columns * int64_t(sizeof(Accumulator<T>));
}

template <class T>
int launch_backward(const BiasActDropoutBackwardParams& params, Stream stream) {
  using A = Accumulator<T>;
  constexpr int width = kVectorElements<T>;
  const BackwardPlan plan = backward_plan(params, width);
  DropoutBackwardArguments<T> a = {};
  a.grad_output = static_cast<const T*>(params.grad_output);
  a.saved = static_cast<const T*>(params.saved);
  a.grad_input = static_cast<T*>(params.grad_input);
  a.count = params.rows * params.columns;
  a.columns = plan.columns;
  a.rows = plan.rows;
  a.rows_per_chunk = plan.rows_per_chunk;
  a.strips = plan.strips;
  a.log2_lanes = plan.log2_lanes;
  a.activation = params.activation;
  a.scale = static_cast<A>(params.scale);
  a.inverse_scale = params.scale == 0 ? A(0) : static_cast<A>(1 / params.scale);
  a.mask = mask_of(params);
  a.whole_vectors = plan.columns % width == 0;
  a.vectors = a.whole_vectors && starts_a_vector(a.grad_output) && starts_a_vector(a.saved) &&
              starts_a_vector(a.grad_input);
  auto* grad_bias = static_cast<T*>(params.grad_bias);
  const bool one_pass = plan.chunks == 1;
  if (one_pass) {
    a.grad_bias = grad_bias;
  } else if (grad_bias != nullptr) {
    a.partial = static_cast<A*>(params.workspace);
  }
  if (a.count > 0) {
    const dim3 grid(static_cast<unsigned>(plan.chunks * plan.strips));
    const int error = with_family(params.activation, [&](auto constant) {
      return launch(bias_act_dropout_backward_kernel<T, decltype(constant)::value>, grid, dim3(kBackwardThreads),
                    sizeof(DropoutBackwardShared<A, width>), stream, a);
    });
    if (error != 0) return error;
  }
  if (grad_bias == nullptr || one_pass || plan.columns == 0) return 0;
  const dim3 grid(static_cast<unsigned>(divide_up(plan.columns, kSumColumns)));
  return launch(bias_act_dropout_sum_kernel<T>, grid, dim3(kSumColumns * kSumRows), sizeof(DropoutSumShared<A>), stream,
                static_cast<const A*>(params.workspace), grad_bias, plan.chunks, plan.columns);
}

}  // namespace

int bias_act_dropout_forward(const BiasActDropoutForwardParams& params, Stream stream) {
  return with_storage_type(params.dtype, [&](auto type) { return launch_forward<decltype(type)>(params, stream); });
}

int64_t bias_act_dropout_backward_workspace_bytes(const BiasActDropoutBackwardParams& params) {
  return with_storage_type(params.dtype, [&](auto type) { return backward_workspace_bytes<decltype(type)>(params); });
}

int bias_act_dropout_backward(const BiasActDropoutBackwardParams& params, Stream stream) {
  if (params.activation == Activation::none && params.grad_bias == nullptr) {
    // Nothing but the mask and the scale: what the forward does.
    BiasActDropoutForwardParams forward = {};
    forward.rows = params.rows;
    forward.columns = params.columns;
    forward.dtype = params.dtype;
    forward.input = params.grad_output;
    forward.output = params.grad_input;
    forward.drop = params.drop;
    forward.p = params.p;
    forward.scale = params.scale;
    forward.seed = params.seed;
    forward.offset = params.offset;
    forward.state = params.state;
    return bias_act_dropout_forward(forward, stream);
  }
  return with_storage_type(params.dtype, [&](auto type) { return launch_backward<decltype(type)>(params, stream); });
}

int dropout_state(const PhiloxState& philox, int64_t* state, Stream stream) {
  return launch(dropout_state_kernel, dim3(1), dim3(1), 0, stream, philox, state);
}

}  // namespace pyconv::cuda
