// The door to the random distortions of images on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace pyconv {

// Writes distorted `images` (N, C, H, W) into `output` (N, C, h, w), of their dtype; both are contiguous and on the CPU,
// and may be the same tensor. positions (N,) int64; smoothing (radius + 1,) float64. `most`: shift down, shift to the
// right, rotation in radians, scale, shear, elastic. See RandomDistortionParams.
void random_distortion(const at::Tensor& images, const at::Tensor& positions, const at::Tensor& output, uint64_t seed,
                       uint32_t epoch, std::array<double, 6> most, const at::Tensor& smoothing, int64_t padding,
                       double flip);

}  // namespace pyconv
