// Training plans on every ISA: no allocation after the first mini-batch, the same bits on any number of threads, and
// fully connected layers against plain loops on small integers, whose sums are exact.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "network/training_plan.h"

namespace {
std::atomic<int64_t> allocations{0};
}

void* operator new(size_t size) {
  ++allocations;
  void* block = std::malloc(size);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
void* operator new(size_t size, std::align_val_t alignment) {
  ++allocations;
  void* block = std::aligned_alloc(static_cast<size_t>(alignment), (size + 127) / 128 * 128);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete(void* block, size_t) noexcept { std::free(block); }
void operator delete(void* block, std::align_val_t) noexcept { std::free(block); }

namespace {

using namespace pyconv;
using network::Operation;
using network::Parameter;
using network::TrainingPlan;

// What a body throws reaches the caller, as from torch's pool.
template <int threads>
void threads_parallel_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  std::vector<std::thread> workers;
  std::mutex mutex;
  std::exception_ptr thrown;
  const int64_t share = (end - begin + threads - 1) / threads;
  for (int64_t first = begin; first < end; first += share) {
    workers.emplace_back([&, first] {
      try {
        body(first, std::min(first + share, end), context);
      } catch (...) {
        const std::lock_guard lock(mutex);
        thrown = std::current_exception();
      }
    });
  }
  for (auto& worker : workers) worker.join();
  if (thrown) std::rethrow_exception(thrown);
}

const Threads kSerial = {1, nullptr};
const Threads kTwo = {2, threads_parallel_for<2>};
const Threads kFive = {5, threads_parallel_for<5>};

// ---- A network: convolution, dropout, two fully connected layers -----------------------------------------------

constexpr int64_t kBatch = 20, kImage = 18, kMaps = 12, kPooled = 7, kHidden = 90, kClasses = 10;

struct Net {
  std::vector<std::vector<float>> values;
  std::vector<float> x;
  std::vector<int64_t> labels;
  TrainingPlan plan;

  static std::vector<Operation> operations() {
    ConvMaxPool2dGeometry g{};
    g.N = kBatch;
    g.C = 1;
    g.H = g.W = kImage;
    g.K = kMaps;
    g.R = g.S = 5;
    g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = g.groups = 1;
    g.OH = g.OW = kImage - 4;
    g.pool_h = g.pool_w = g.pool_stride_h = g.pool_stride_w = 2;
    g.pool_dilation_h = g.pool_dilation_w = 1;
    g.PH = g.PW = kPooled;
    g.activation = Activation::relu;
    std::vector<Operation> found(5);
    found[0].kind = Operation::Kind::conv_max_pool2d;
    found[0].conv = {g, {25, 25, 5, 1}, 0, 1};
    found[1].kind = Operation::Kind::bias_act_dropout;
    found[1].pointwise = {kMaps * kPooled * kPooled, Activation::none, -1, 0.5, 1.0, 0};
    found[2].kind = Operation::Kind::dense;
    found[2].dense = {{kBatch, kMaps * kPooled * kPooled, kHidden, true}, 2};
    found[3].kind = Operation::Kind::bias_act_dropout;
    found[3].pointwise = {kHidden, Activation::tanh, 3, 0.0, 1.0, -1};
    found[4].kind = Operation::Kind::dense;
    found[4].dense = {{kBatch, kClasses, kHidden, false}, 4};
    return found;
  }

  static std::vector<Parameter> parameters() {
    std::vector<Parameter> found;
    for (const int64_t count : {kMaps * 25, kMaps, kMaps * kPooled * kPooled * kHidden, kHidden, kClasses * kHidden}) {
      Parameter parameter;
      parameter.count = count;
      parameter.step = {0.05, 0.01, 0.0, 0.0, false, false};
      parameter.in_l2 = true;
      found.push_back(parameter);
    }
    return found;
  }

  explicit Net(int64_t examples)
      : plan(DType::float32, kBatch, kImage * kImage, kClasses, operations(), parameters()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (Parameter& parameter : plan.parameters()) {
      values.emplace_back(static_cast<size_t>(parameter.count));
      for (float& value : values.back()) value = 0.2f * normal(random);
      parameter.data = values.back().data();
    }
    x.resize(static_cast<size_t>(examples * kImage * kImage));
    for (float& value : x) value = normal(random);
    for (int64_t i = 0; i < examples; ++i) labels.push_back(i % kClasses);
  }

  network::Progress run(int64_t first, int64_t last, const Threads& threads) {
    const auto count = static_cast<int64_t>(labels.size());
    std::vector<double> costs(static_cast<size_t>(last - first));
    const auto seeds = [](int) { return uint64_t(7); };
    return plan.run({x.data(), labels.data(), count, nullptr}, count, kBatch, first, last, 1e9, threads, seeds,
                    costs.data());
  }
};

void no_mini_batch_allocates() {
  Net net(40 * kBatch);
  net.run(0, 1, kSerial);
  const auto of_a_run = [&](int64_t first, int64_t last) {
    const int64_t before = allocations;
    const network::Progress progress = net.run(first, last, kSerial);
    CHECK(progress.mini_batches == last - first, "%ld done", long(progress.mini_batches));
    return allocations - before;
  };
  const int64_t one = of_a_run(1, 2), many = of_a_run(2, 40);
  CHECK(one == many, "%ld allocations in a run of one mini-batch, %ld in one of 38", long(one), long(many));
}

void any_number_of_threads_gives_the_same_bits() {
  Net expected(5 * kBatch + 3);
  expected.run(0, 6, kSerial);
  for (const Threads& threads : {kTwo, kFive}) {
    Net net(5 * kBatch + 3);
    net.run(0, 6, threads);
    for (size_t i = 0; i < net.values.size(); ++i) {
      CHECK(std::memcmp(net.values[i].data(), expected.values[i].data(), net.values[i].size() * sizeof(float)) == 0,
            "parameter %zu on %ld threads", i, long(threads.num_threads));
    }
  }
}

void what_is_out_of_range_is_found_before_it_is_used() {
  Net net(2 * kBatch);
  net.labels[kBatch + 3] = kClasses;
  const network::Progress progress = net.run(0, 2, kTwo);
  CHECK(progress.mini_batches == 1 && progress.obstacle == network::Progress::Obstacle::no_such_label &&
            progress.index == kBatch + 3,
        "%ld done, example %ld", long(progress.mini_batches), long(progress.index));
}

// The other threads of the team must not wait for its loops for ever.
void an_exception_ends_a_run() {
  for (const Threads& threads : {kSerial, kTwo, kFive}) {
    Net net(3 * kBatch);
    std::vector<double> costs(3);
    int asked = 0;
    const auto seeds = [&](int) -> uint64_t {
      if (++asked == 2) throw std::runtime_error("no more seeds");
      return 1;
    };
    std::string caught;
    try {
      net.plan.run({net.x.data(), net.labels.data(), 3 * kBatch, nullptr}, 3 * kBatch, kBatch, 0, 3, 1e9, threads, seeds,
                   costs.data());
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "no more seeds" && asked == 2, "%s after %d", caught.c_str(), asked);
  }
}

// ---- Fully connected layers on small integers ------------------------------------------------------------------

struct Dense {
  DenseGeometry g;
  std::vector<float> matrix, input, grad_output;

  Dense(int64_t n, int64_t rows, int64_t columns, bool inputs_are_rows, int zeros_of_4, uint32_t seed)
      : g{n, rows, columns, inputs_are_rows} {
    std::mt19937 random(seed);
    const auto fill = [&](std::vector<float>& to, int64_t count, int zeros) {
      for (int64_t i = 0; i < count; ++i) {
        to.push_back(int(random() % 4) < zeros ? 0.0f : float(int(random() % 4) - 1) + (zeros == 0 ? 2.0f : 0.0f));
      }
    };
    fill(matrix, rows * columns, 1);
    fill(input, n * g.inputs(), zeros_of_4);
    fill(grad_output, n * g.outputs(), 1);
  }

  size_t at(int64_t in, int64_t out) const {
    return static_cast<size_t>(g.inputs_are_rows ? in * g.columns + out : out * g.columns + in);
  }
};

void check_dense(const Dense& d, const Threads& threads, bool zero_is_dead, const std::string& isa) {
  const DenseGeometry& g = d.g;
  const cpu::KernelTable& table = cpu::kernel_table();
  const auto out_count = static_cast<size_t>(g.N * g.outputs()), in_count = static_cast<size_t>(g.N * g.inputs());
  std::vector<float> output(out_count, -1.0f), grad_input(in_count, -1.0f), updated = d.matrix;
  DenseForwardParams f{g, DType::float32, d.matrix.data(), d.input.data(), output.data(), nullptr, threads};
  std::vector<double> workspace(static_cast<size_t>(table.dense_forward_workspace_bytes(f) / 8 + 16));
  const auto aligned = [&] {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  };
  f.workspace = aligned();
  table.dense_forward(f);
  double squares = -1;
  DenseBackwardParams b{};
  b.geometry = g;
  b.dtype = DType::float32;
  b.input = d.input.data();
  b.grad_output = d.grad_output.data();
  b.grad_input = grad_input.data();
  b.input_zero_is_dead = zero_is_dead;
  b.matrix = updated.data();
  b.update = true;
  b.step = {0.5, 2.0, 0.0, 0.0, false, false};
  b.squares = &squares;
  b.threads = threads;
  workspace.resize(static_cast<size_t>(table.dense_backward_workspace_bytes(b) / 8 + 16));
  b.workspace = aligned();
  table.dense_backward(b);

  int wrong = 0;
  double expected_squares = 0;
  for (int64_t n = 0; n < g.N; ++n) {
    for (int64_t out = 0; out < g.outputs(); ++out) {
      float sum = 0;
      for (int64_t in = 0; in < g.inputs(); ++in) sum += d.input[size_t(n * g.inputs() + in)] * d.matrix[d.at(in, out)];
      wrong += output[size_t(n * g.outputs() + out)] != sum;
    }
    for (int64_t in = 0; in < g.inputs(); ++in) {
      float sum = 0;
      for (int64_t out = 0; out < g.outputs(); ++out) {
        sum += d.grad_output[size_t(n * g.outputs() + out)] * d.matrix[d.at(in, out)];
      }
      const float got = grad_input[size_t(n * g.inputs() + in)];
      const bool dead = zero_is_dead && d.input[size_t(n * g.inputs() + in)] == 0.0f;
      wrong += got != sum && !(dead && got == 0.0f);
    }
  }
  for (int64_t in = 0; in < g.inputs(); ++in) {
    for (int64_t out = 0; out < g.outputs(); ++out) {
      float gradient = 0;
      for (int64_t n = 0; n < g.N; ++n) {
        gradient += d.input[size_t(n * g.inputs() + in)] * d.grad_output[size_t(n * g.outputs() + out)];
      }
      const float old = d.matrix[d.at(in, out)], expected = old - 0.5f * (gradient + 2.0f * old);
      wrong += updated[d.at(in, out)] != expected;
      expected_squares += double(expected) * expected;
    }
  }
  CHECK(wrong == 0 && squares == expected_squares, "%s: %d wrong of N %ld, %ldx%ld, inputs are %s, squares %f for %f",
        isa.c_str(), wrong, long(g.N), long(g.rows), long(g.columns), g.inputs_are_rows ? "rows" : "columns", squares,
        expected_squares);
}

void dense_layers(const std::string& isa) {
  const int64_t sizes[][2] = {{1, 1}, {33, 10}, {10, 33}, {70, 100}, {64, 128}, {31, 530}, {300, 130}};
  uint32_t seed = 0;
  for (const auto& size : sizes) {
    for (const int64_t n : {1, 2, 7, 10, 11, 40}) {
      for (const bool inputs_are_rows : {true, false}) {
        for (const int zeros : {0, 3}) {
          const Dense d(n, size[0], size[1], inputs_are_rows, zeros, ++seed);
          check_dense(d, seed % 2 ? kSerial : kTwo, zeros == 3 && seed % 3 == 0, isa);
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (int i = 0; i < cpu::compiled_isa_count(); ++i) {
    const std::string isa = cpu::compiled_isa(i);
    if (cpu::set_isa(isa.c_str()) != cpu::SetIsaResult::ok) continue;
    no_mini_batch_allocates();
    any_number_of_threads_gives_the_same_bits();
    what_is_out_of_range_is_found_before_it_is_used();
    an_exception_ends_a_run();
    dense_layers(isa);
  }
  return check_result();
}
