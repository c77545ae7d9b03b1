// Forward of conv_max_pool2d in bfloat16 where the CPU multiplies it: the direct kernels, with elements of two input
// channels. Compiled for AVX512_BF16 alone.
//
// vdpbf16ps adds the products of two pairs to a float, one after the other, each product exact and each sum rounded to
// nearest even, as two multiply-adds of the widened values. Subnormal operands and results count as zero.
#include "conv_max_pool2d_forward_direct.h"
#include "isa_kernels.h"

namespace pyconv::cpu {
namespace {

struct DirectPairs : BFloat16Pairs {
  static constexpr int64_t kMaxTerms = 2048;  // of one running sum: far more digits than the result's eight are left

  static Vec<float> multiply_add(Vec<float> x, Vec<float> w, Vec<float> sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)x.v, (__m512bh)w.v)};
  }

  static void load_weights(const ConvMaxPool2dForwardParams& p, int64_t first_k, int64_t count, bool pairs,
                           int64_t out_stride, float* out) {
    constexpr int64_t kLanes = kWidth<float>;
    const ConvMaxPool2dGeometry& g = p.geometry;
    const Strides4 st = p.weight_strides;
    const int64_t Cg = g.C / g.groups, channels = ceil_div(Cg, 2), taps = g.R * g.S;
    const BFloat16* weight = static_cast<const BFloat16*>(p.weight) + first_k * st.n;
    // Element i of the k that a lane stands for: load(its weights, first element, elements).
    const auto transpose_elements = [&](int64_t elements, float* to, int64_t step, const auto& load_some) {
      for (int64_t first = 0; first < elements; first += kLanes) {
        const int64_t some = min_of(kLanes, elements - first);
        Vec<float> block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          block[i] = i < count ? load_some(weight + i * st.n, first, some) : zero<float>();
        }
        transpose(block);
        for (int64_t i = 0; i < some; ++i) store(to + (first + i) * step, pairs ? doubled_lanes(block[i]) : block[i]);
      }
    };
    if (st.c == 1) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t offset = tap / g.S * st.h + tap % g.S * st.w;
        transpose_elements(channels, out + tap * out_stride, taps * out_stride,
                           [&](const BFloat16* of_k, int64_t first, int64_t) {
                             return load_pixel(of_k + offset + 2 * first, Cg - 2 * first);
                           });
      }
      return;
    }
    const bool dense = st.w == 1 && st.h == g.S;
    for (int64_t c = 0; c < Cg; c += 2) {
      transpose_elements(taps, out + c / 2 * taps * out_stride, out_stride,
                         [&](const BFloat16* of_k, int64_t first, int64_t some) {
                           const BFloat16* from = of_k + c * st.c;
                           if (dense) return load_row(from + first, st.c, Cg - c, some);
                           float elements[kLanes];
                           for (int64_t i = 0; i < some; ++i) {
                             const int64_t tap = first + i;
                             elements[i] = element(from + tap / g.S * st.h + tap % g.S * st.w, st.c, Cg - c);
                           }
                           return load_partial(elements, some);
                         });
    }
  }
};

template <bool IN_REGISTERS>
int64_t workspace_bytes(const ConvMaxPool2dForwardParams& params) {
  return Plan<float>(params, IN_REGISTERS, DirectPairs::kChannels).workspace_bytes();
}

template <bool IN_REGISTERS>
void run(const ConvMaxPool2dForwardParams& params) {
  DirectForward<DirectPairs>(params, IN_REGISTERS).run();
}

bool accepts(const ConvMaxPool2dForwardParams& params) {
  return params.dtype == DType::bfloat16 && params.geometry.C / params.geometry.groups >= 2;
}

const Kernel<ConvMaxPool2dForwardParams> kKernels[] = {
    {"bfloat16_pool2x2", "bfloat16; at least two channels a group; 2x2 pooling as direct_pool2x2", true,
     [](const ConvMaxPool2dForwardParams& p) { return accepts(p) && is_plain_2x2(p.geometry); }, workspace_bytes<true>,
     run<true>},
    {"bfloat16", "bfloat16; at least two channels a group", true, accepts, workspace_bytes<false>, run<false>},
};

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

KernelList<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_kernels() {
  return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])};
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
