// The conv_max_pool2d kernels against a naive loop, without torch: every ISA and every entry of its dispatch list,
// on small integers, where the results must be the same bits; on one thread and on three.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "params.h"

using namespace pyconv;

namespace {

char context[128] = "";  // what a failed check was about

void serial_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) { body(begin, end, context); }

void threaded_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back([=] { body(i, i + 1, context); });
  for (auto& thread : threads) thread.join();
}

struct Problem {
  ConvMaxPool2dGeometry g;
  std::vector<float> input, weight, bias, grad_output;
};

int64_t pick(std::mt19937& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % static_cast<uint32_t>(high - low + 1));
}

int64_t extent(int64_t size, int64_t padding, int64_t window, int64_t stride, int64_t dilation) {
  return (size + padding - dilation * (window - 1) - 1) / stride + 1;
}

// A random geometry; false where the filter or the window does not fit.
bool make_problem(uint32_t seed, bool plain_pooling, Problem& problem) {
  std::mt19937 random(seed);
  ConvMaxPool2dGeometry g{};
  g.groups = pick(random, 1, 3);
  g.C = g.groups * pick(random, 1, 7);
  g.K = g.groups * pick(random, 1, 50);
  g.N = pick(random, 1, 4);
  g.H = pick(random, 5, 15);
  g.W = pick(random, 5, 15);
  g.R = pick(random, 1, 4);
  g.S = pick(random, 1, 4);
  g.stride_h = pick(random, 1, 2);
  g.stride_w = pick(random, 1, 3);
  g.pad_top = pick(random, 0, 2);
  g.pad_left = pick(random, 0, 2);
  g.dilation_h = pick(random, 1, 2);
  g.dilation_w = pick(random, 1, 2);
  const int64_t pad_h = g.pad_top + pick(random, 0, 2), pad_w = g.pad_left + pick(random, 0, 2);
  if (g.H + pad_h < (g.R - 1) * g.dilation_h + 1 || g.W + pad_w < (g.S - 1) * g.dilation_w + 1) return false;
  g.OH = extent(g.H, pad_h, g.R, g.stride_h, g.dilation_h);
  g.OW = extent(g.W, pad_w, g.S, g.stride_w, g.dilation_w);
  const auto pooling = [&](int64_t plain, int64_t low, int64_t high) {
    return plain_pooling ? plain : pick(random, low, high);
  };
  g.pool_h = pooling(2, 1, 3);
  g.pool_w = pooling(2, 1, 3);
  g.pool_stride_h = pooling(2, 1, 3);
  g.pool_stride_w = pooling(2, 1, 3);
  g.pool_pad_h = pooling(0, 0, g.pool_h / 2);
  g.pool_pad_w = pooling(0, 0, g.pool_w / 2);
  g.pool_dilation_h = pooling(1, 1, 2);
  g.pool_dilation_w = pooling(1, 1, 2);
  if (g.OH + 2 * g.pool_pad_h < (g.pool_h - 1) * g.pool_dilation_h + 1) return false;
  if (g.OW + 2 * g.pool_pad_w < (g.pool_w - 1) * g.pool_dilation_w + 1) return false;
  g.PH = extent(g.OH, 2 * g.pool_pad_h, g.pool_h, g.pool_stride_h, g.pool_dilation_h);
  g.PW = extent(g.OW, 2 * g.pool_pad_w, g.pool_w, g.pool_stride_w, g.pool_dilation_w);
  g.activation = pick(random, 0, 1) == 0 ? Activation::none : Activation::relu;
  problem.g = g;
  const auto fill = [&](std::vector<float>& v, int64_t count, int64_t magnitude) {
    v.resize(static_cast<size_t>(count));
    for (float& x : v) x = static_cast<float>(pick(random, -magnitude, magnitude));
  };
  fill(problem.input, g.N * g.C * g.H * g.W, 3);
  fill(problem.weight, g.K * (g.C / g.groups) * g.R * g.S, 2);
  fill(problem.bias, g.K, 3);
  fill(problem.grad_output, g.N * g.K * g.PH * g.PW, 2);
  return true;
}

struct Answer {
  std::vector<float> output, grad_input, grad_weight, grad_bias;
  std::vector<uint8_t> argmax;
};

Answer naive(const Problem& problem) {
  const auto& g = problem.g;
  const int64_t Cg = g.C / g.groups, Kg = g.K / g.groups;
  Answer a;
  a.output.assign(problem.grad_output.size(), 0);
  a.argmax.assign(problem.grad_output.size(), kNoGradientByte);
  a.grad_input.assign(problem.input.size(), 0);
  a.grad_weight.assign(problem.weight.size(), 0);
  a.grad_bias.assign(problem.bias.size(), 0);
  // action(input index, weight index) for every term of convolution output (n, k, oh, ow)
  const auto for_each_term = [&](int64_t n, int64_t k, int64_t oh, int64_t ow, const auto& action) {
    for (int64_t c = 0; c < Cg; ++c) {
      for (int64_t r = 0; r < g.R; ++r) {
        for (int64_t s = 0; s < g.S; ++s) {
          const int64_t h = oh * g.stride_h - g.pad_top + r * g.dilation_h;
          const int64_t w = ow * g.stride_w - g.pad_left + s * g.dilation_w;
          if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
          action(static_cast<size_t>(((n * g.C + k / Kg * Cg + c) * g.H + h) * g.W + w),
                 static_cast<size_t>(((k * Cg + c) * g.R + r) * g.S + s));
        }
      }
    }
  };
  for (int64_t n = 0; n < g.N; ++n) {
    for (int64_t k = 0; k < g.K; ++k) {
      for (int64_t ph = 0; ph < g.PH; ++ph) {
        for (int64_t pw = 0; pw < g.PW; ++pw) {
          float best = -std::numeric_limits<float>::infinity();
          int64_t best_oh = -1, best_ow = -1, best_position = -1;
          for (int64_t i = 0; i < g.pool_h; ++i) {
            for (int64_t j = 0; j < g.pool_w; ++j) {
              const int64_t oh = ph * g.pool_stride_h - g.pool_pad_h + i * g.pool_dilation_h;
              const int64_t ow = pw * g.pool_stride_w - g.pool_pad_w + j * g.pool_dilation_w;
              if (oh < 0 || oh >= g.OH || ow < 0 || ow >= g.OW) continue;
              float sum = 0;
              for_each_term(n, k, oh, ow, [&](size_t x, size_t w) { sum += problem.input[x] * problem.weight[w]; });
              if (best_position < 0 || sum > best) {
                best = sum;
                best_oh = oh;
                best_ow = ow;
                best_position = i * g.pool_w + j;
              }
            }
          }
          const size_t at = static_cast<size_t>(((n * g.K + k) * g.PH + ph) * g.PW + pw);
          float y = best + problem.bias[static_cast<size_t>(k)];
          const bool live = best_position >= 0 && (g.activation == Activation::none || y > 0);
          if (g.activation == Activation::relu && y < 0) y = 0;
          a.output[at] = y;
          if (!live) continue;
          a.argmax[at] = static_cast<uint8_t>(best_position);
          const float gradient = problem.grad_output[at];
          a.grad_bias[static_cast<size_t>(k)] += gradient;
          for_each_term(n, k, best_oh, best_ow, [&](size_t x, size_t w) {
            a.grad_input[x] += gradient * problem.weight[w];
            a.grad_weight[w] += gradient * problem.input[x];
          });
        }
      }
    }
  }
  return a;
}

Strides4 dense(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  if (channels_last) return {height * width * channels, 1, width * channels, channels};
  return {channels * height * width, height * width, width, 1};
}

// Copies between logical NCHW order and a dense layout.
template <class T>
std::vector<T> to_layout(const std::vector<T>& values, int64_t n, int64_t c, int64_t h, int64_t w, const Strides4& st) {
  std::vector<T> out(values.size());
  size_t i = 0;
  for (int64_t a = 0; a < n; ++a)
    for (int64_t b = 0; b < c; ++b)
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < w; ++x) out[static_cast<size_t>(a * st.n + b * st.c + y * st.h + x * st.w)] = values[i++];
  return out;
}
template <class T>
std::vector<T> from_layout(const std::vector<T>& values, int64_t n, int64_t c, int64_t h, int64_t w,
                           const Strides4& st) {
  std::vector<T> out(values.size());
  size_t i = 0;
  for (int64_t a = 0; a < n; ++a)
    for (int64_t b = 0; b < c; ++b)
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < w; ++x) out[i++] = values[static_cast<size_t>(a * st.n + b * st.c + y * st.h + x * st.w)];
  return out;
}

// A workspace with a guard behind it.
struct Workspace {
  static constexpr unsigned char kGuard = 0xa5;
  std::vector<unsigned char> memory;
  unsigned char* begin;
  int64_t bytes;
  explicit Workspace(int64_t size) : memory(static_cast<size_t>(size) + 192, kGuard), bytes(size) {
    begin = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  bool intact() const {
    for (int64_t i = 0; i < 64; ++i) {
      if (begin[bytes + i] != kGuard) return false;
    }
    return true;
  }
};

void check_problem(const Problem& problem, const Answer& want, bool channels_last, const Threads& threads) {
  const auto& g = problem.g;
  const auto& table = cpu::kernel_table();
  const Strides4 input_strides = dense(g.C, g.H, g.W, channels_last);
  const Strides4 output_strides = dense(g.K, g.PH, g.PW, channels_last);
  const Strides4 weight_strides = dense(g.C / g.groups, g.R, g.S, channels_last);
  const auto input = to_layout(problem.input, g.N, g.C, g.H, g.W, input_strides);
  const auto weight = to_layout(problem.weight, g.K, g.C / g.groups, g.R, g.S, weight_strides);
  std::vector<uint8_t> argmax;
  for (int i = 0; i < table.conv_max_pool2d_forward.count; ++i) {
    const auto& kernel = table.conv_max_pool2d_forward.entries[i];
    std::vector<float> output(want.output.size());
    argmax.assign(want.argmax.size(), 0);
    ConvMaxPool2dForwardParams p{};
    p.geometry = g;
    p.dtype = DType::float32;
    p.input = input.data();
    p.input_strides = input_strides;
    p.weight = weight.data();
    p.weight_strides = weight_strides;
    p.bias = problem.bias.data();
    p.bias_stride = 1;
    p.output = output.data();
    p.output_strides = output_strides;
    p.argmax = argmax.data();
    p.threads = threads;
    if (!kernel.accepts(p)) continue;
    Workspace workspace(kernel.workspace_bytes(p));
    p.workspace = workspace.begin;
    kernel.run(p);
    CHECK(workspace.intact(), "%s", context);
    CHECK(from_layout(output, g.N, g.K, g.PH, g.PW, output_strides) == want.output, "%s", context);
    CHECK(from_layout(argmax, g.N, g.K, g.PH, g.PW, output_strides) == want.argmax, "%s", context);
  }
  const auto grad_output = to_layout(problem.grad_output, g.N, g.K, g.PH, g.PW, output_strides);
  for (int i = 0; i < table.conv_max_pool2d_backward.count; ++i) {
    const auto& kernel = table.conv_max_pool2d_backward.entries[i];
    std::vector<float> grad_input(want.grad_input.size()), grad_weight(want.grad_weight.size()),
        grad_bias(want.grad_bias.size());
    ConvMaxPool2dBackwardParams p{};
    p.geometry = g;
    p.dtype = DType::float32;
    p.grad_output = grad_output.data();
    p.argmax = argmax.data();
    p.output_strides = output_strides;
    p.input = input.data();
    p.input_strides = input_strides;
    p.weight = weight.data();
    p.weight_strides = weight_strides;
    p.grad_input = grad_input.data();
    p.grad_input_strides = input_strides;
    p.grad_weight = grad_weight.data();
    p.grad_weight_strides = weight_strides;
    p.grad_bias = grad_bias.data();
    p.threads = threads;
    if (!kernel.accepts(p)) continue;
    Workspace workspace(kernel.workspace_bytes(p));
    p.workspace = workspace.begin;
    kernel.run(p);
    CHECK(workspace.intact(), "%s", context);
    CHECK(from_layout(grad_input, g.N, g.C, g.H, g.W, input_strides) == want.grad_input, "%s", context);
    CHECK(from_layout(grad_weight, g.K, g.C / g.groups, g.R, g.S, weight_strides) == want.grad_weight, "%s", context);
    CHECK(grad_bias == want.grad_bias, "%s", context);
  }
}

}  // namespace

int main() {
  int problems = 0;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    Problem problem;
    if (!make_problem(seed, seed % 2 == 0, problem)) continue;
    const Answer want = naive(problem);
    ++problems;
    for (int isa = 0; isa < cpu::compiled_isa_count(); ++isa) {
      if (!cpu::cpu_supports(isa)) continue;
      CHECK(cpu::set_isa(cpu::compiled_isa(isa)) == cpu::SetIsaResult::ok, "%s", context);
      for (const bool channels_last : {false, true}) {
        std::snprintf(context, sizeof context, "problem %u, %s, %s", seed, cpu::isa(), channels_last ? "NHWC" : "NCHW");
        check_problem(problem, want, channels_last, {1, serial_for});
        check_problem(problem, want, channels_last, {3, threaded_for});
      }
    }
  }
  CHECK(problems > 30, "%s", context);
  CHECK(cpu::set_isa("no such instruction set") == cpu::SetIsaResult::unknown, "%s", context);
  std::printf("%d problems\n", problems);
  return check_result();
}
