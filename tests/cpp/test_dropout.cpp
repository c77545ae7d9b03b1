// Philox against its authors' vectors; the kernels of every ISA against the definition in philox.h and
// against scalar.
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/simd.h"
#include "philox.h"

namespace {

using namespace pyconv;

const DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
const Activation kActivations[] = {Activation::none, Activation::relu, Activation::sigmoid,
                                   Activation::tanh, Activation::gelu, Activation::silu};

// ---- Threads --------------------------------------------------------------------------------------------

template <int threads>
void threads_parallel_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  std::vector<std::thread> workers;
  const int64_t share = (end - begin + threads - 1) / threads;
  for (int64_t first = begin; first < end; first += share) {
    workers.emplace_back(body, first, std::min(first + share, end), context);
  }
  for (auto& worker : workers) worker.join();
}

// One call of the body for each index, last index first: the finest chunks, in an unexpected order.
void backwards_parallel_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  for (int64_t i = end - 1; i >= begin; --i) body(i, i + 1, context);
}

const Threads kSerial = {1, nullptr};
const Threads kOtherThreads[] = {
    {2, threads_parallel_for<2>}, {3, threads_parallel_for<3>}, {64, backwards_parallel_for}};

// ---- Tensors of any type, seen as doubles ---------------------------------------------------------------

size_t size_of(DType type) { return type == DType::float64 ? 8 : type == DType::float32 ? 4 : 2; }

class Array {
 public:
  Array(DType type, int64_t count)
      : type_(type), count_(count), bytes_(size_of(type) * (count + kGuard), kFill) {}

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }

  double operator[](int64_t i) const {
    switch (type_) {
      case DType::float32:
        return at<float>(i);
      case DType::float64:
        return at<double>(i);
      case DType::bfloat16:
        return cpu::widen(at<BFloat16>(i));
      case DType::float16:
        return cpu::widen(at<Float16>(i));
    }
    return 0;
  }

  void set(int64_t i, double value) {
    switch (type_) {
      case DType::float32:
        return put(i, static_cast<float>(value));
      case DType::float64:
        return put(i, value);
      case DType::bfloat16:
        return put(i, cpu::narrow<BFloat16>(static_cast<float>(value)));
      case DType::float16:
        return put(i, cpu::narrow<Float16>(static_cast<float>(value)));
    }
  }

  // Nothing was written behind the last element.
  bool guard_is_intact() const {
    for (size_t i = size_of(type_) * count_; i < bytes_.size(); ++i) {
      if (bytes_[i] != kFill) return false;
    }
    return true;
  }

  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr int64_t kGuard = 64;
  static constexpr unsigned char kFill = 0xa5;

  template <class T>
  T at(int64_t i) const {
    T value;
    std::memcpy(&value, &bytes_[i * sizeof(T)], sizeof(T));
    return value;
  }
  template <class T>
  void put(int64_t i, T value) {
    std::memcpy(&bytes_[i * sizeof(T)], &value, sizeof(T));
  }

  DType type_;
  int64_t count_;
  std::vector<unsigned char> bytes_;
};

Array random_array(DType type, int64_t count, uint64_t seed) {
  Array array(type, count);
  for (int64_t i = 0; i < count; ++i) {
    array.set(i, philox_block(seed, 99, i).word[0] / 1073741824.0 - 2.0);  // [-2, 2)
  }
  return array;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// ---- Philox and the definition of a mask ----------------------------------------------------------------

// Random123, tests/kat_vectors, "philox4x32 10".
void test_known_answers() {
  struct Vector {
    uint32_t counter[4], key[2], expected[4];
  };
  const Vector vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Vector& v : vectors) {
    const PhiloxBlock by_words =
        philox4x32(v.counter[0], v.counter[1], v.counter[2], v.counter[3], v.key[0], v.key[1]);
    const PhiloxBlock by_stream = philox_block(v.key[0] | static_cast<uint64_t>(v.key[1]) << 32,
                                               v.counter[2] | static_cast<uint64_t>(v.counter[3]) << 32,
                                               v.counter[0] | static_cast<uint64_t>(v.counter[1]) << 32);
    for (int i = 0; i < 4; ++i) {
      CHECK(by_words.word[i] == v.expected[i], "word %d: %08x, expected %08x", i, by_words.word[i],
            v.expected[i]);
      CHECK(by_stream.word[i] == v.expected[i], "word %d: %08x, expected %08x", i, by_stream.word[i],
            v.expected[i]);
    }
  }
}

void test_draws() {
  CHECK(dropout_draws(0.5).bytes && dropout_draws(0.5).threshold == 128, "p = 0.5");
  CHECK(dropout_draws(1.0 / 256).bytes && dropout_draws(1.0 / 256).threshold == 1, "p = 1/256");
  CHECK(dropout_draws(255.0 / 256).bytes && dropout_draws(255.0 / 256).threshold == 255, "p = 255/256");
  CHECK(!dropout_draws(0.1).bytes && dropout_draws(0.1).threshold == 429496730, "p = 0.1");
  CHECK(!dropout_draws(1e-12).bytes && dropout_draws(1e-12).threshold == 0, "p = 1e-12");
  CHECK(dropout_draws(1 - 1e-12).threshold == uint64_t(1) << 32, "a p that rounds to 1");

  const uint64_t seed = 0x0123456789abcdef, offset = 0xfedcba9876543210;
  const PhiloxBlock block = philox_block(seed, offset, 5);
  for (uint64_t i = 0; i < 16; ++i) {
    const uint32_t byte = block.word[i / 4] >> (8 * (i % 4)) & 0xff;
    CHECK(is_dropped(dropout_draws(0.25), seed, offset, 5 * 16 + i) == (byte < 64), "byte %d",
          static_cast<int>(i));
  }
  for (uint64_t i = 0; i < 4; ++i) {
    CHECK(is_dropped(dropout_draws(0.3), seed, offset, 5 * 4 + i) == (block.word[i] < 1288490189u), "word %d",
          static_cast<int>(i));
  }
}

// ---- Kernels --------------------------------------------------------------------------------------------

struct Problem {
  int64_t rows, columns;
  DType dtype;
  Activation activation;
  bool bias;
  bool drop;
  double p, scale;
  uint64_t seed, offset;
};

bool saves_pre_activation(Activation a) { return a == Activation::gelu || a == Activation::silu; }

struct Result {
  Array output, pre_activation, grad_input, grad_bias;
};

Result run(const Problem& q, const Threads& threads) {
  const int64_t count = q.rows * q.columns;
  const Array input = random_array(q.dtype, count, 1), bias = random_array(q.dtype, q.columns, 2);
  const Array grad_output = random_array(q.dtype, count, 3);
  Result r{Array(q.dtype, count), Array(q.dtype, count), Array(q.dtype, count), Array(q.dtype, q.columns)};

  BiasActDropoutForwardParams f{};
  f.rows = q.rows;
  f.columns = q.columns;
  f.dtype = q.dtype;
  f.activation = q.activation;
  f.input = input.data();
  f.bias = q.bias ? bias.data() : nullptr;
  f.output = r.output.data();
  f.pre_activation = saves_pre_activation(q.activation) ? r.pre_activation.data() : nullptr;
  f.drop = q.drop;
  f.p = q.p;
  f.scale = q.scale;
  f.seed = q.seed;
  f.offset = q.offset;
  f.threads = threads;
  cpu::kernel_table().bias_act_dropout_forward(f);

  BiasActDropoutBackwardParams b{};
  b.rows = q.rows;
  b.columns = q.columns;
  b.dtype = q.dtype;
  b.activation = q.activation;
  b.grad_output = grad_output.data();
  b.saved = q.activation == Activation::none     ? nullptr
            : saves_pre_activation(q.activation) ? r.pre_activation.data()
                                                 : r.output.data();
  b.grad_input = r.grad_input.data();
  b.grad_bias = q.bias ? r.grad_bias.data() : nullptr;
  b.drop = q.drop;
  b.p = q.p;
  b.scale = q.scale;
  b.seed = q.seed;
  b.offset = q.offset;
  b.threads = threads;
  cpu::kernel_table().bias_act_dropout_backward(b);
  return r;
}

double relative_eps(DType type) {
  switch (type) {
    case DType::float32:
      return 1.2e-7;
    case DType::float64:
      return 2.3e-16;
    case DType::bfloat16:
      return 7.9e-3;
    case DType::float16:
      return 9.8e-4;
  }
  return 0;
}

// Every element against the formulas in double.
void check_values(const Problem& q, const Result& r, const std::string& what) {
  const int64_t count = q.rows * q.columns;
  const Array input = random_array(q.dtype, count, 1), bias = random_array(q.dtype, q.columns, 2);
  const Array grad_output = random_array(q.dtype, count, 3);
  const double eps = 4 * relative_eps(q.dtype);
  std::vector<double> sums(q.columns, 0), magnitudes(q.columns, 0);
  for (int64_t i = 0; i < count; ++i) {
    const bool dropped = q.drop && is_dropped(dropout_draws(q.p), q.seed, q.offset, i);
    const double factor = dropped ? 0 : q.scale;
    const double x = input[i] + (q.bias ? bias[i % q.columns] : 0);
    const double y = cpu::activate(q.activation, x);
    CHECK(std::abs(r.output[i] - y * factor) <= eps * std::max(1.0, std::abs(y * factor)),
          "%s: element %lld is %g, expected %g", what.c_str(), static_cast<long long>(i), r.output[i],
          y * factor);
    if (saves_pre_activation(q.activation)) {
      CHECK(std::abs(r.pre_activation[i] - x) <= eps * std::max(1.0, std::abs(x)), "%s: pre-activation %lld",
            what.c_str(), static_cast<long long>(i));
    }
    const double derivative =
        q.activation == Activation::none
            ? 1
            : cpu::activation_derivative(q.activation, saves_pre_activation(q.activation) ? x : y);
    const double gradient = grad_output[i] * factor * derivative;
    CHECK(std::abs(r.grad_input[i] - gradient) <= eps * std::max(1.0, 2 * q.scale),
          "%s: gradient %lld is %g, expected %g", what.c_str(), static_cast<long long>(i), r.grad_input[i],
          gradient);
    sums[i % q.columns] += gradient;
    magnitudes[i % q.columns] += 2 * q.scale;
  }
  if (!q.bias) return;
  for (int64_t c = 0; c < q.columns; ++c) {
    CHECK(std::abs(r.grad_bias[c] - sums[c]) <= eps * (magnitudes[c] + std::abs(sums[c])),
          "%s: bias gradient %lld is %g, expected %g", what.c_str(), static_cast<long long>(c),
          r.grad_bias[c], sums[c]);
  }
}

std::string name_of(const Problem& q) {
  return std::string(cpu::isa()) + ", " + std::to_string(q.rows) + "x" + std::to_string(q.columns) +
         ", type " + std::to_string(static_cast<int>(q.dtype)) + ", activation " +
         std::to_string(static_cast<int>(q.activation)) + (q.bias ? ", bias" : "") +
         (q.drop ? ", p " + std::to_string(q.p) : "");
}

std::vector<Problem> problems() {
  std::vector<Problem> list;
  const int64_t shapes[][2] = {{1, 1},   {1, 7},   {3, 10},   {10, 100}, {1, 2048},
                               {5, 513}, {70, 33}, {2, 5000}, {40, 520}, {1, 40001}};
  const uint64_t seed = 0x8badf00d12345678, offset = 0x1000000020;
  for (const auto& shape : shapes) {
    for (DType dtype : kDTypes) {
      for (Activation activation : kActivations) {
        const bool bias = shape[0] > 1 || activation == Activation::gelu;
        list.push_back({shape[0], shape[1], dtype, activation, bias, true, 0.5, 2.0, seed, offset});
        list.push_back({shape[0], shape[1], dtype, activation, bias, true, 0.3, 1 / 0.7, seed, offset});
      }
    }
  }
  for (Activation activation : kActivations) {
    list.push_back({9, 100, DType::float32, activation, false, false, 0, 1.0, 0, 0});
    list.push_back({9, 100, DType::float32, activation, true, false, 0.25, 0.75, 0, 0});
    list.push_back({9, 100, DType::float32, activation, true, false, 1, 0.0, 0, 0});
    list.push_back({9, 100, DType::float32, activation, true, true, 1e-12, 1.0, seed, offset});
    list.push_back({9, 100, DType::float32, activation, true, true, 1 - 1e-12, 1.0, seed, offset});
    list.push_back({9, 100, DType::float32, activation, true, true, 0.25, 1.0, seed, 0});
    list.push_back(
        {9, 100, DType::float32, activation, true, true, 255.0 / 256, 256.0, ~uint64_t(0), ~uint64_t(0)});
  }
  return list;
}

// With activation none and relu every ISA does the same operations in the same order.
bool is_exact(const Problem& q) {
  return q.activation == Activation::none || q.activation == Activation::relu;
}

void test_kernels() {
  for (const Problem& q : problems()) {
    cpu::set_isa("scalar");
    const Result scalar = run(q, kSerial);
    for (int i = 0; i < cpu::compiled_isa_count(); ++i) {
      if (!cpu::cpu_supports(i)) continue;
      cpu::set_isa(cpu::compiled_isa(i));
      const std::string what = name_of(q);
      const Result serial = run(q, kSerial);
      CHECK(serial.output.guard_is_intact() && serial.pre_activation.guard_is_intact() &&
                serial.grad_input.guard_is_intact() && serial.grad_bias.guard_is_intact(),
            "%s: written behind the end", what.c_str());
      check_values(q, serial, what);
      if (is_exact(q)) {
        CHECK(serial.output == scalar.output && serial.grad_input == scalar.grad_input &&
                  serial.grad_bias == scalar.grad_bias,
              "%s: differs from scalar", what.c_str());
      }
      for (const Threads& threads : kOtherThreads) {
        const Result parallel = run(q, threads);
        CHECK(parallel.output == serial.output && parallel.pre_activation == serial.pre_activation &&
                  parallel.grad_input == serial.grad_input && parallel.grad_bias == serial.grad_bias,
              "%s: %d threads differ from one", what.c_str(), static_cast<int>(threads.num_threads));
      }
    }
  }
}

// A dropped element is input * 0: NaN for inf and NaN. The activation keeps NaN.
void test_not_finite() {
  const double values[] = {INFINITY, -INFINITY, NAN, -1.5, 0.0};
  for (int i = 0; i < cpu::compiled_isa_count(); ++i) {
    if (!cpu::cpu_supports(i)) continue;
    cpu::set_isa(cpu::compiled_isa(i));
    for (DType dtype : kDTypes) {
      for (Activation activation : {Activation::none, Activation::relu}) {
        const int64_t count = 200;
        Array input(dtype, count), output(dtype, count), gradient(dtype, count);
        for (int64_t j = 0; j < count; ++j) input.set(j, values[j % 5]);
        BiasActDropoutForwardParams f{};
        f.rows = 1;
        f.columns = count;
        f.dtype = dtype;
        f.activation = activation;
        f.input = input.data();
        f.output = output.data();
        f.drop = true;
        f.p = 0.5;
        f.scale = 2;
        f.seed = 42;
        f.threads = kSerial;
        cpu::kernel_table().bias_act_dropout_forward(f);
        BiasActDropoutBackwardParams b{};
        b.rows = 1;
        b.columns = count;
        b.dtype = dtype;
        b.activation = activation;
        b.grad_output = input.data();
        b.saved = activation == Activation::none ? nullptr : output.data();
        b.grad_input = gradient.data();
        b.drop = true;
        b.p = 0.5;
        b.scale = 2;
        b.seed = 42;
        b.threads = kSerial;
        cpu::kernel_table().bias_act_dropout_backward(b);
        for (int64_t j = 0; j < count; ++j) {
          const double x = input[j], factor = is_dropped(dropout_draws(0.5), 42, 0, j) ? 0.0 : 2.0;
          const double y = activation == Activation::relu && x < 0 ? 0.0 : x;
          CHECK(same(output[j], y * factor), "%s: element %d: dropout of %g is %g", cpu::isa(),
                static_cast<int>(j), x, output[j]);
          // A dropped element passes grad_output * 0 on, a dead one nothing.
          const bool dead = activation == Activation::relu && factor != 0 && x <= 0;
          CHECK(same(gradient[j], dead ? 0.0 : x * factor), "%s: element %d: gradient of %g is %g",
                cpu::isa(), static_cast<int>(j), x, gradient[j]);
        }
      }
    }
  }
}

void test_empty() {
  for (int i = 0; i < cpu::compiled_isa_count(); ++i) {
    if (!cpu::cpu_supports(i)) continue;
    cpu::set_isa(cpu::compiled_isa(i));
    const Result no_rows = run({0, 5, DType::float32, Activation::none, true, true, 0.5, 2, 1, 0}, kSerial);
    for (int64_t c = 0; c < 5; ++c)
      CHECK(no_rows.grad_bias[c] == 0, "%s: bias gradient without rows", cpu::isa());
    run({5, 0, DType::float32, Activation::none, true, true, 0.5, 2, 1, 0}, kSerial);
  }
}

}  // namespace

int main() {
  test_known_answers();
  test_draws();
  test_kernels();
  test_not_finite();
  test_empty();
  return check_result();
}
