// One mistake in each kernel, and kernels without one beside them. `mistakes NAME` runs the kernel of that name and
// says "right" or "wrong" of its result, unless the emulation ends the process first.
#include <cstdio>
#include <cstring>
#include <vector>

#include "device.cuh"

namespace pyconv::cuda {

constexpr int kThreads = 128;

struct Words {
  uint32_t words[kThreads];
};
// Rows of 16 bytes: sizes that no mistake of the kernels runs over.
struct Rows {
  uint4 rows[kThreads];
};
struct Stages {
  uint32_t words[2][kThreads];
};

// ---- Block barriers -----------------------------------------------------------------------------------------

// out[t] = in[last - t]
template <bool Barrier>
__global__ void reverse(const uint32_t* in, uint32_t* out) {
  Words& shared = shared_memory<Words>();
  const int t = threadIdx.x;
  shared.words[t] = in[t];
  if constexpr (Barrier) __syncthreads();
  out[t] = shared.words[kThreads - 1 - t];
}

// The second round writes where the first one reads.
template <bool Barrier>
__global__ void two_rounds(const uint32_t* in, uint32_t* out) {
  Words& shared = shared_memory<Words>();
  const int t = threadIdx.x;
  uint32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    shared.words[t] = round * in[t];
    __syncthreads();
    sum += shared.words[kThreads - 1 - t];
    if constexpr (Barrier) __syncthreads();
  }
  out[t] = sum;
}

__global__ void divergent_barrier(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  if (t < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = in[kThreads - 1 - t];
}

__global__ void barrier_of_half_a_warp(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  if (t % 32 < 16) __syncthreads();
  out[t] = __shfl_sync(0xffffffffu, in[kThreads - 1 - t], t % 32);
}

// Threads that have ended are not waited for.
__global__ void early_exit(const uint32_t* in, uint32_t* out) {
  Words& shared = shared_memory<Words>();
  const int t = threadIdx.x;
  shared.words[t] = in[t];
  out[t] = in[kThreads - 1 - t];
  if (t >= 70) return;
  __syncthreads();
  if (t < 70) out[t] = in[kThreads - 70 + shared.words[69 - t]];
}

// ---- Warps --------------------------------------------------------------------------------------------------

template <bool Barrier>
__global__ void reverse_in_warps(const uint32_t* in, uint32_t* out) {
  Words& shared = shared_memory<Words>();
  const int t = threadIdx.x, last = t / 32 * 32 + 31;
  shared.words[t] = in[t];
  if constexpr (Barrier) __syncwarp();
  const uint32_t mine = shared.words[last - t % 32];
  out[kThreads - 1 - last + t % 32] = mine;
}

__global__ void reverse_by_shuffles(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  out[(3 - t / 32) * 32 + t % 32] = __shfl_sync(0xffffffffu, in[t], 31 - t % 32);
}

__global__ void mask_without_the_caller(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  out[t] = __shfl_xor_sync(0x0000ffffu, in[t], 1);
}

__global__ void masks_that_differ(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  out[t] = __shfl_xor_sync(t % 2 == 0 ? 0xffffffffu : 0x0fffffffu | 1u << t % 32, in[t], 1);
}

__global__ void shuffle_in_a_branch(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  if (t % 32 < 16) {
    out[t] = __shfl_xor_sync(0xffffffffu, in[t], 1);
  } else {
    out[t] = __shfl_xor_sync(0xffffffffu, in[t], 1);
  }
}

__global__ void shuffle_from_a_lane_outside(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  if (t % 32 < 16) out[t] = __shfl_down_sync(0x0000ffffu, in[t], 1);
}

__global__ void matrices_of_half_a_warp(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  if (t % 32 >= 16) return;
  float d[4] = {};
  const uint32_t a[4] = {in[t]}, b[2] = {};
  mma_tf32(d, a, b);
  out[t] = __float_as_uint(d[0]);
}

__global__ void unaligned_matrix_row(const uint32_t* in, uint32_t* out) {
  Rows& shared = shared_memory<Rows>();
  const int t = threadIdx.x;
  shared.rows[t] = make_uint4(in[t], in[t], in[t], in[t]);
  __syncthreads();
  uint32_t words[4];
  load_matrices(words, reinterpret_cast<char*>(&shared.rows[t]) + (t == 3 ? 8 : 0));
  out[t] = words[0];
}

// ---- Asynchronous copies ------------------------------------------------------------------------------------

enum class Wait { right, none_before_the_read, too_few_groups, never };

// Copies in groups of one; reads the first group while the second is under way.
template <Wait How>
__global__ void reverse_by_copies(const uint32_t* in, uint32_t* out) {
  Stages& shared = shared_memory<Stages>();
  const int t = threadIdx.x;
  copy_async<4>(&shared.words[0][t], in + t, true);
  copies_commit();
  copy_async<4>(&shared.words[1][t], in + kThreads - 1 - t, true);
  copies_commit();
  if constexpr (How == Wait::right) copies_wait<1>();
  if constexpr (How == Wait::too_few_groups) copies_wait<2>();
  __syncthreads();
  out[t] = shared.words[0][kThreads - 1 - t];
  if constexpr (How != Wait::never) copies_wait<0>();
}

// Fills the stage again while other warps may still read it.
template <bool Barrier>
__global__ void refill(const uint32_t* in, uint32_t* out) {
  Stages& shared = shared_memory<Stages>();
  const int t = threadIdx.x;
  uint32_t last = 0;
  for (int round = 0; round < 4; ++round) {
    copy_async<4>(&shared.words[0][t], in + t, true);
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    last |= shared.words[0][kThreads - 1 - t];
    if constexpr (Barrier) __syncthreads();
  }
  out[t] = last;
}

__global__ void unaligned_copy(const uint32_t* in, uint32_t* out) {
  Rows& shared = shared_memory<Rows>();
  const int t = threadIdx.x;
  copy_async<16>(&shared.rows[t], in + 1, true);
  copies_commit();
  copies_wait<0>();
  out[t] = shared.rows[t].x;
}

// ---- Memory -------------------------------------------------------------------------------------------------

__global__ void global_overrun(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  out[t + (t == kThreads - 1)] = in[kThreads - 1 - t];
}

__global__ void global_read_overrun(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  out[t] = in[t + 1];
}

__global__ void copy_overrun(const uint32_t* in, uint32_t* out) {
  Words& shared = shared_memory<Words>();
  const int t = threadIdx.x;
  copy_async<4>(&shared.words[t], in + t + 1, true);
  copies_commit();
  copies_wait<0>();
  out[t] = shared.words[t];
}

__global__ void shared_overrun(const uint32_t* in, uint32_t* out) {
  uint32_t* words = shared_memory<Words>().words;
  const int t = threadIdx.x;
  words[t + 1] = in[t];
  __syncthreads();
  out[t] = words[kThreads - t];
}

__global__ void shared_underrun(const uint32_t* in, uint32_t* out) {
  uint32_t* words = shared_memory<Words>().words;
  const int t = threadIdx.x;
  words[t - 1] = in[t];
  __syncthreads();
  out[t] = words[kThreads - 2 - t];
}

__global__ void unaligned_vector(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  out[t] = reinterpret_cast<const uint2*>(in + 1)[t / 4].x;
}

__global__ void more_shared_memory_than_asked_for(const uint32_t* in, uint32_t* out) {
  struct Twice {
    Words first, second;
  };
  Twice& shared = shared_memory<Twice>();
  const int t = threadIdx.x;
  shared.second.words[t] = in[kThreads - 1 - t];
  out[t] = shared.second.words[t];
}

// A word that was not written is read, but decides nothing.
__global__ void uninitialised_read(const uint32_t* in, uint32_t* out) {
  Words& shared = shared_memory<Words>();
  const int t = threadIdx.x;
  if (t != 5) shared.words[t] = in[t];
  __syncthreads();
  const uint32_t other = shared.words[kThreads - 1 - t];
  out[t] = other == kThreads ? other : in[kThreads - 1 - t];
}

// ---- By name ------------------------------------------------------------------------------------------------

using KernelFunction = void (*)(const uint32_t*, uint32_t*);
struct Named {
  const char* name;
  KernelFunction kernel;
  size_t shared_bytes;
};
constexpr Named kKernels[] = {
    {"reverse", reverse<true>, sizeof(Words)},
    {"missing_barrier", reverse<false>, sizeof(Words)},
    {"two_rounds", two_rounds<true>, sizeof(Words)},
    {"missing_second_barrier", two_rounds<false>, sizeof(Words)},
    {"divergent_barrier", divergent_barrier, 0},
    {"barrier_of_half_a_warp", barrier_of_half_a_warp, 0},
    {"early_exit", early_exit, sizeof(Words)},
    {"reverse_in_warps", reverse_in_warps<true>, sizeof(Words)},
    {"missing_warp_barrier", reverse_in_warps<false>, sizeof(Words)},
    {"reverse_by_shuffles", reverse_by_shuffles, 0},
    {"mask_without_the_caller", mask_without_the_caller, 0},
    {"masks_that_differ", masks_that_differ, 0},
    {"shuffle_in_a_branch", shuffle_in_a_branch, 0},
    {"shuffle_from_a_lane_outside", shuffle_from_a_lane_outside, 0},
    {"matrices_of_half_a_warp", matrices_of_half_a_warp, 0},
    {"unaligned_matrix_row", unaligned_matrix_row, sizeof(Rows)},
    {"reverse_by_copies", reverse_by_copies<Wait::right>, sizeof(Stages)},
    {"missing_wait", reverse_by_copies<Wait::none_before_the_read>, sizeof(Stages)},
    {"wait_for_too_few_groups", reverse_by_copies<Wait::too_few_groups>, sizeof(Stages)},
    {"never_waited", reverse_by_copies<Wait::never>, sizeof(Stages)},
    {"refill", refill<true>, sizeof(Stages)},
    {"refill_too_early", refill<false>, sizeof(Stages)},
    {"unaligned_copy", unaligned_copy, sizeof(Rows)},
    {"global_overrun", global_overrun, 0},
    {"global_read_overrun", global_read_overrun, 0},
    {"copy_overrun", copy_overrun, sizeof(Words)},
    {"shared_overrun", shared_overrun, sizeof(Words)},
    {"shared_underrun", shared_underrun, sizeof(Words)},
    {"unaligned_vector", unaligned_vector, 0},
    {"more_shared_memory_than_asked_for", more_shared_memory_than_asked_for, sizeof(Words)},
    {"uninitialised_read", uninitialised_read, sizeof(Words)},
};

}  // namespace pyconv::cuda

int main(int argc, char** argv) {
  using namespace pyconv::cuda;
  for (const Named& named : kKernels) {
    if (argc != 2 || std::strcmp(named.name, argv[1]) != 0) continue;
    std::vector<uint32_t> in(kThreads), out(kThreads);
    for (int t = 0; t < kThreads; ++t) in[t] = t;
    const int error = launch(named.kernel, 1, kThreads, named.shared_bytes, nullptr, in.data(), out.data());
    bool right = error == 0;
    for (int t = 0; t < kThreads; ++t) right = right && out[t] == static_cast<uint32_t>(kThreads - 1 - t);
    std::puts(right ? "right" : "wrong");
    return 0;
  }
  std::fprintf(stderr, "mistakes: expected the name of a kernel\n");
  return 2;
}
