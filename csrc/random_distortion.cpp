// The door to the random distortions of images: what pyconv.RandomDistortion has checked becomes params.
#include "random_distortion.h"

#include "door.h"

namespace pyconv {
namespace {

using at::Tensor;

void check(const Tensor& images, const Tensor& positions, const Tensor& output, const Tensor& smoothing,
           int64_t padding) {
  const auto fits = [](const Tensor& t, int64_t dim) {
    return t.device().is_cpu() && t.layout() == at::kStrided && t.dim() == dim && t.is_contiguous();
  };
  TORCH_CHECK(fits(images, 4) && fits(output, 4) && images.scalar_type() == output.scalar_type() &&
                  images.size(0) == output.size(0) && images.size(1) == output.size(1),
              "random_distortion: expected contiguous images and output [N, C, height, width] on the CPU, but got ",
              images.sizes(), " ", images.scalar_type(), " and ", output.sizes(), " ", output.scalar_type());
  TORCH_CHECK(fits(positions, 1) && positions.scalar_type() == at::kLong && positions.size(0) == images.size(0),
              "random_distortion: expected contiguous int64 positions of size [", images.size(0), "], but got ",
              positions.sizes(), " ", positions.scalar_type());
  TORCH_CHECK(fits(smoothing, 1) && smoothing.scalar_type() == at::kDouble && smoothing.size(0) >= 1,
              "random_distortion: expected contiguous float64 weights, but got ", smoothing.sizes(), " ",
              smoothing.scalar_type());
  TORCH_CHECK(padding >= 0 && output.size(2) <= images.size(2) + 2 * padding &&
                  output.size(3) <= images.size(3) + 2 * padding,
              "random_distortion: expected an output within images of size ", images.sizes(), " padded by ", padding,
              ", but got ", output.sizes());
  const auto* values = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < positions.size(0); ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0, "expected positions that are not negative, but got ", values[i], " at index ", i);
  }
}

}  // namespace

void random_distortion(const Tensor& images, const Tensor& positions, const Tensor& output, uint64_t seed,
                       uint32_t epoch, std::array<double, 6> most, const Tensor& smoothing, int64_t padding,
                       double flip) {
  check(images, positions, output, smoothing, padding);
  if (output.numel() == 0) return;
  RandomDistortionParams p{};
  p.N = images.size(0);
  p.C = images.size(1);
  p.H = images.size(2);
  p.W = images.size(3);
  p.output_h = output.size(2);
  p.output_w = output.size(3);
  p.dtype = kernel_dtype(images.scalar_type());
  p.images = images.const_data_ptr();
  p.output = output.mutable_data_ptr();
  output.unsafeGetTensorImpl()->bump_version();
  p.positions = positions.const_data_ptr<int64_t>();
  p.seed = seed;
  p.epoch = epoch;
  p.shift_h = most[0];
  p.shift_w = most[1];
  p.rotation = most[2];
  p.scale = most[3];
  p.shear = most[4];
  p.elastic = most[5];
  p.smoothing = smoothing.const_data_ptr<double>();
  p.radius = smoothing.size(0) - 1;
  p.padding = padding;
  p.flip = flip;
  const int64_t pixels = p.output_h * p.output_w;
  const int64_t taps = p.elastic == 0 ? 0 : std::min(2 * p.radius + 1, p.output_h + p.output_w);
  p.threads = threads_for(p.N * pixels * (4 * taps + p.C * (p.interpolates() ? 30 : 4)));
  const auto& kernels = cpu::kernel_table();
  const Workspace workspace(kernels.random_distortion_workspace_bytes(p));
  p.workspace = workspace.data();
  kernels.random_distortion(p);
}

}  // namespace pyconv
