// What the Winograd forward of conv_max_pool2d computes in which pieces, and what it keeps in its workspace.
#pragma once

#include "conv_max_pool2d_forward_epilogue.h"
#include "conv_max_pool2d_forward_tasks.h"
#include "parallel.h"

namespace pyconv::cpu {
namespace {

constexpr int kMaxBlocks = 3;               // along an axis: filters of up to 9 taps times the stride
constexpr int64_t kTaskBytes = 512 * 1024;  // V and M of a step: stay in a core's L2

// One axis of the filter, cut into blocks of two or three taps.
struct Axis {
  int64_t blocks;
  int64_t first[kMaxBlocks], taps[kMaxBlocks];

  explicit Axis(int64_t size) : blocks(ceil_div(size, 3)) {
    int64_t next = 0;
    for (int64_t b = 0; b < blocks && b < kMaxBlocks; ++b) {
      first[b] = next;
      taps[b] = size / blocks + (b < size % blocks ? 1 : 0);
      next += taps[b];
    }
  }
  // Transformed positions of all blocks.
  int64_t positions() const {
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) count += taps[b] == 3 ? 4 : 3;
    return count;
  }
  // Whether block b has anything at transformed position i of 4.
  bool reaches(int64_t b, int64_t i) const { return i < 3 || taps[b] == 3; }
};

template <class A>
struct Plan {
  static constexpr int64_t kLanes = kWidth<A>;

  const ConvMaxPool2dGeometry& g;
  bool plain;  // 2x2 windows that are tiles: pooled in registers
  Axis rows, columns;
  int64_t Cg, Kg;
  KBlocks k_blocks;
  int64_t channels, padded_channels;  // of the patch: every phase of every input channel, phase by phase
  int64_t depth[16], slot[16][kMaxBlocks * kMaxBlocks];  // channels of all blocks; a block's place among them, or -1
  int64_t v_offset[16], u_offset[16];                    // per tile and per vector of K, in elements
  int64_t total_depth;                                   // over the 16 positions
  int64_t tile_columns;
  int64_t step;                 // tile rows computed at a time
  int64_t chunk, chunks;        // pooled rows of a task; tasks along PH
  int64_t tasks, workers;
  int64_t patch_columns, conv_capacity;
  // Workspace, in elements of A: weights, then per worker: patch, vertical transforms, V, M, conv, results.
  int64_t weight_elements, patch_elements, vertical_elements, v_elements, m_elements, conv_elements, result_elements;
  int64_t worker_elements;
  Copies weight_copies;

  explicit Plan(const ConvMaxPool2dForwardParams& p)
      : g(p.geometry), plain(is_plain_2x2(g)), rows(ceil_div(g.R, g.stride_h)), columns(ceil_div(g.S, g.stride_w)),
        k_blocks(ceil_div(g.K / g.groups, kLanes)) {
    Cg = g.C / g.groups;
    Kg = g.K / g.groups;
    channels = g.stride_h * g.stride_w * Cg;
    padded_channels = round_up(channels, kLanes);
    total_depth = 0;
    for (int64_t position = 0; position < 16; ++position) {
      int64_t blocks = 0;
      for (int64_t b = 0; b < rows.blocks * columns.blocks; ++b) {
        const bool live = rows.reaches(b / columns.blocks, position / 4) &&
                          columns.reaches(b % columns.blocks, position % 4);
        slot[position][b] = live ? blocks++ : -1;
      }
      depth[position] = blocks * channels;
      v_offset[position] = u_offset[position] = total_depth;
      total_depth += depth[position];
    }
    tile_columns = ceil_div(plain ? 2 * g.PW : g.OW, 2);
    patch_columns = 2 * (tile_columns - 1) + columns.first[columns.blocks - 1] + 4;

    const int64_t block_lanes = k_blocks.widest() * kLanes;
    const int64_t row_bytes = tile_columns * (total_depth + 16 * block_lanes) * static_cast<int64_t>(sizeof(A));
    const int64_t all_rows = ceil_div(plain ? 2 * g.PH : g.OH, 2);
    step = max_of(1, min_of(all_rows, kTaskBytes / row_bytes));
    step = ceil_div(all_rows, ceil_div(all_rows, step));
    chunk = pooled_rows_of_task(g, g.PH, p.threads.num_threads);
    chunks = ceil_div(g.PH, chunk);
    tasks = forward_tasks(g, chunk);
    workers = max_of(1, min_of(p.threads.num_threads, tasks));
    // What is kept when a pooled row is still incomplete is less than its window.
    conv_capacity = min_of(2 * step + (g.pool_h - 1) * g.pool_dilation_h, round_up(g.OH, 2));

    weight_elements = g.groups * k_blocks.vectors * kLanes * total_depth;
    weight_copies = Copies(weight_elements * static_cast<int64_t>(sizeof(A)), workers);
    patch_elements = (2 * (step - 1) + rows.first[rows.blocks - 1] + 4) * patch_columns * padded_channels;
    vertical_elements = 4 * patch_columns * kLanes;
    v_elements = round_up(step * tile_columns * total_depth, 16);
    m_elements = 16 * step * tile_columns * block_lanes;
    conv_elements = plain ? 0 : k_blocks.vectors * kLanes * conv_capacity * 2 * tile_columns;
    const int64_t pooled_rows = plain ? step : most_pooled_rows(g, conv_capacity);
    result_elements = pooled_rows * g.PW * block_lanes;
    worker_elements = patch_elements + vertical_elements + v_elements + m_elements + conv_elements + 3 * result_elements;
  }

  int64_t weight_bytes() const { return weight_copies.count() * weight_elements * static_cast<int64_t>(sizeof(A)); }
  int64_t image_flag_bytes() const { return round_up(g.N, 64); }
  int64_t flag_bytes() const { return image_flag_bytes() + weight_copies.flag_bytes(); }
  // The direct kernel takes the same place afterwards, behind the flags.
  int64_t workspace_bytes() const {
    return weight_bytes() + workers * worker_elements * static_cast<int64_t>(sizeof(A));
  }
};

}  // namespace
}  // namespace pyconv::cpu
