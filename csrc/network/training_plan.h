// A training step of a feedforward network as a list of operations on buffers made once: forward, loss, backward and the
// parameters' update of one mini-batch after the other, without allocation and without torch.
//
//   conv_max_pool2d   x (n, C, H, W) -> activation(max_pool2d(conv2d(x, w)) + b)
//   dense             x (n, in)      -> x * matrix
//   bias_act_dropout  x (n, columns) -> dropout(activation(x + b))
//   cross entropy     logits (n, classes), labels -> mean cost and its gradient; always last
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../cpu/isa.h"
#include "../params.h"

namespace pyconv::network {

// Memory that the plan trains in place. The pointer may change between two runs, the rest may not.
struct Parameter {
  int64_t count = 0;
  void* data = nullptr;
  void* momentum_buffer = nullptr;
  bool trained = true;
  SgdStep step{};      // in the coming mini-batch
  bool in_l2 = false;  // whether its squares belong to the cost
  double squares = 0;  // of its present values; kept where in_l2
};

struct ConvMaxPool2dLayer {
  ConvMaxPool2dGeometry geometry;  // for the largest mini-batch
  Strides4 weight_strides;
  int weight = -1, bias = -1;  // numbers of parameters; -1 without
};

struct DenseLayer {
  DenseGeometry geometry;  // for the largest mini-batch
  int matrix = -1;
};

struct BiasActDropoutLayer {
  int64_t columns;
  Activation activation;
  int bias = -1;
  double p, scale;
  int generator = -1;  // the source of its seeds; -1 without a mask
};

// One of the three.
struct Operation {
  enum class Kind { conv_max_pool2d, dense, bias_act_dropout } kind;
  ConvMaxPool2dLayer conv{};
  DenseLayer dense{};
  BiasActDropoutLayer pointwise{};
};

// Examples in memory, and in which order they are taken: their positions, or null for the order they have.
struct Examples {
  const void* x;          // (count, features), contiguous
  const int64_t* labels;  // (count,)
  int64_t count;
  const int64_t* order;
};

struct Progress {
  int64_t mini_batches = 0;  // done
  // What kept the next one from being done, the parameters staying as they were before it.
  enum class Obstacle { none, cost_not_finite, no_such_position, no_such_label } obstacle = Obstacle::none;
  int64_t index = 0;  // of the example that has no such position or label, in the order
};

class TrainingPlan {
 public:
  // The next seed of a generator.
  using Seeds = std::function<uint64_t(int generator)>;

  TrainingPlan(DType dtype, int64_t batch, int64_t features, int64_t classes, std::vector<Operation> operations,
               std::vector<Parameter> parameters);

  std::vector<Parameter>& parameters() { return parameters_; }
  double l2 = 0;  // the cost's factor of the sum of squares

  // Mini-batches [first, last) of a pass over the first `count` examples in their order, mini_batch of them each (the
  // last may be smaller), until `seconds` have passed. costs[i] is that of mini-batch first + i before its update.
  Progress run(const Examples& examples, int64_t count, int64_t mini_batch, int64_t first, int64_t last, double seconds,
               const Threads& pool, const Seeds& seeds, double* costs);

  // One row of a table per operation.
  struct Row {
    std::string operation, input, output, kernels;
    int64_t flops, bytes;
    double forward_seconds, backward_seconds;  // of all mini-batches so far
  };
  std::vector<Row> describe(const Threads& pool);
  int64_t buffer_bytes() const { return buffer_bytes_; }
  int64_t mini_batches() const { return mini_batches_; }  // done so far

 private:
  // What an operation keeps between its forward and its backward.
  struct State {
    void* output = nullptr;         // (n, ...): the next one's input
    void* grad_output = nullptr;    // of the cost by it
    void* argmax = nullptr;         // conv_max_pool2d
    void* pre_activation = nullptr;
    uint64_t seed = 0;              // of its dropout
    double forward_seconds = 0, backward_seconds = 0;
  };
  struct Free {
    void operator()(void* block) const;
  };

  ConvMaxPool2dForwardParams conv_forward(size_t i, int64_t n, const void* input, const Threads& threads) const;
  ConvMaxPool2dBackwardParams conv_backward(size_t i, int64_t n, const void* input, void* grad_input,
                                            const Threads& threads) const;
  DenseForwardParams dense_forward(size_t i, int64_t n, const void* input, const Threads& threads) const;
  DenseBackwardParams dense_backward(size_t i, int64_t n, const void* input, void* grad_input, const Threads& threads);
  BiasActDropoutForwardParams pointwise_forward(size_t i, int64_t n, const void* input, const Threads& threads) const;
  BiasActDropoutBackwardParams pointwise_backward(size_t i, int64_t n, void* grad_input, const Threads& threads) const;
  SoftmaxCrossEntropyParams cross_entropy(int64_t n, double* loss) const;

  template <class Layout>
  void lay_out(const Layout& take);
  int64_t workspace_bytes(int64_t n, const class Team& team);
  int64_t output_elements(size_t i) const;  // of one example
  bool trains(int parameter) const { return parameter >= 0 && parameters_[static_cast<size_t>(parameter)].trained; }
  bool has_trained_parameters(size_t i) const;
  // Whether an operation before this one has parameters to train.
  bool needs_grad_input(size_t i) const;
  // Whether its gradient stops wherever an output of this operation is 0: behind ReLU, and dropout of ReLU.
  bool zero_is_dead(size_t i) const;

  // input_ and labels of a mini-batch; false if an example has none.
  bool fetch(const Examples& examples, int64_t begin, int64_t n, Progress& progress);
  void forward(int64_t n, const class Team& team, const Seeds& seeds);
  void backward(int64_t n, const class Team& team);
  void update(int parameter, const class Team& team);
  Threads conv_threads(size_t i, int64_t n, const class Team& team) const;
  Threads dense_threads(size_t i, int64_t n, const class Team& team) const;
  double sum_of_squares() const;

  DType dtype_;
  int64_t batch_, features_, classes_;
  std::vector<Operation> operations_;
  std::vector<Parameter> parameters_;
  std::vector<State> states_;
  std::vector<void*> gradients_;  // of the parameters, where they are ever in memory
  const void* input_ = nullptr;   // (n, features) of this mini-batch: among the examples, or rows_
  void* rows_ = nullptr;
  int64_t* labels_ = nullptr;  // of this mini-batch
  int64_t buffer_bytes_ = 0, workspace_bytes_ = 0;
  std::unique_ptr<void, Free> memory_, workspace_memory_;
  void* workspace_ = nullptr;
  double cost_seconds_ = 0;
  int64_t mini_batches_ = 0;
};

}  // namespace pyconv::network
