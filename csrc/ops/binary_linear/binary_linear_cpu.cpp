// SPDX-License-Identifier: Apache-2.0
// CPU kernels of binary products, compiled once per instruction-set level.
//
// A task makes the results of up to 192 rows and some columns (binary_linear_plan.cpp): it
// interleaves its rows of a once, then goes through its columns panel by panel: interleaves a panel
// of b (32 columns of 768 bits are 3 KB), and runs the register tile of binary_linear_tile.h down
// the rows. What it works on stays in the L1 and L2 caches.
//
// A ternary tile of rows without a zero is a signed one: its second plane says nothing new, and one
// pass is saved.
#include "core/scratch.h"
#include "ops/binary_linear/binary_linear.h"
#include "ops/binary_linear/binary_linear_epilogue.h"
#include "ops/binary_linear/binary_linear_threshold.h"

namespace fastbb {
namespace {

// Rows of a task, cut evenly into tiles: 128 are 21 tiles of 6 or 5 rows, not 21 of 6 and one of 2.
struct TileRows {
  int64_t count, tiles;
  int64_t first(int64_t tile) const { return tile * count / tiles; }
  int size(int64_t tile) const { return static_cast<int>(first(tile + 1) - first(tile)); }
};

TileRows tiles_of(int64_t count) { return {count, (count + kTileRows - 1) / kTileRows}; }

// Rows of a, interleaved tile by tile.
struct Rows {
  TileRows tiles;
  int64_t words;
  int planes;
  uint64_t* data;  // [tiles][planes][words][rows of the tile]
  int32_t* ones;   // [planes][rows]

  uint64_t* tile(int64_t index, int plane) const {
    return data + (tiles.first(index) * planes + plane * tiles.size(index)) * words;
  }
  int32_t ones_of(int64_t row, int plane) const { return ones[plane * tiles.count + row]; }
};

void interleave_rows(const BinaryLinearParams& p, const uint8_t* a, const Rows& rows) {
  for (int64_t i = 0; i < rows.tiles.tiles; ++i) {
    const int64_t first = rows.tiles.first(i);
    for (int plane = 0; plane < rows.planes; ++plane) {
      interleave_tile(a + first * p.a_row + plane * bit_row_bytes(p.k), p.a_row, rows.tiles.size(i),
                      rows.words, rows.tile(i, plane),
                      rows.ones + plane * rows.tiles.count + first);
    }
  }
}

// Counts of a tile: of a's first plane where its rows are signed or unsigned, or ternary without a
// zero; else the difference of its planes.
void count_rows(const BinaryLinearParams& p, const Rows& rows, int64_t index, const uint64_t* panel,
                Tile& tile) {
  const int64_t first = rows.tiles.first(index);
  tile.rows = rows.tiles.size(index);
  bool zeros = false;
  for (int r = 0; r < tile.rows; ++r) {
    tile.ones[r] = rows.ones_of(first + r, 0);
    zeros |= rows.planes == 2 && tile.ones[r] + rows.ones_of(first + r, 1) < p.k;
  }
  tile.as_signed = is_signed(p.a_kind) && !zeros;
  count_tile_of(tile.rows, rows.tile(index, 0), panel, rows.words, tile.counts);
  if (!zeros) return;
  alignas(64) int32_t negative[kTileRows * kPanel];
  count_tile_of(tile.rows, rows.tile(index, 1), panel, rows.words, negative);
  for (int i = 0; i < tile.rows * kPanel; ++i) tile.counts[i] -= negative[i];
  for (int r = 0; r < tile.rows; ++r) tile.ones[r] -= rows.ones_of(first + r, 1);
}

void task(const BinaryLinearParams& p, const BinaryLinearPlan& plan, int64_t index) {
  const int64_t batch = index / plan.column_tiles / plan.row_tiles;
  const int64_t first_row = index / plan.column_tiles % plan.row_tiles * plan.rows;
  const int64_t count = p.m - first_row < plan.rows ? p.m - first_row : plan.rows;
  const int64_t first_column = index % plan.column_tiles * plan.columns;
  const int64_t end_column = p.n - first_column < plan.columns ? p.n : first_column + plan.columns;

  const int64_t words = (p.k + 63) / 64;
  const int planes = bit_planes(p.a_kind);
  const auto panel_words = static_cast<size_t>(words * kPanel);
  const auto row_words = static_cast<size_t>(words * planes * count);
  const auto ones_bytes = sizeof(int32_t) * static_cast<size_t>(planes * count);
  auto* panel = static_cast<uint64_t*>(thread_scratch(8 * (panel_words + row_words) + ones_bytes));
  const Rows rows{tiles_of(count), words, planes, panel + panel_words,
                  reinterpret_cast<int32_t*>(panel + panel_words + row_words)};
  interleave_rows(p, p.a + batch * p.a_batch + first_row * p.a_row, rows);

  const bool b_signed = is_signed(p.b_kind);
  const DotTerms dots[2] = {dot_terms(false, b_signed, p.k), dot_terms(true, b_signed, p.k)};
  const int64_t b_row = bit_row_bytes(p.k);
  const uint8_t* b = p.b + batch * p.b_batch;
  const StoreTile store_tile = store_of(p);
  const bool gelu_bits = p.out_kind == BinaryOut::kBits && p.activation == Activation::kGelu;
  PanelTerms terms;
  BitIntervals intervals;
  int32_t ones[kPanel];
  Tile tile;
  for (tile.column = first_column; tile.column < end_column; tile.column += kPanel) {
    const int64_t rest = end_column - tile.column;
    tile.columns = static_cast<int>(rest < kPanel ? rest : kPanel);
    interleave_panel(b + tile.column * b_row, b_row, tile.columns, words, panel, ones);
    fill_terms(p, dots, tile.column, tile.columns, ones, terms);
    const bool by_interval = gelu_bits && count >= kThresholdRows && rising(terms);
    if (by_interval) find_intervals(p, terms, intervals);
    for (int64_t i = 0; i < rows.tiles.tiles; ++i) {
      count_rows(p, rows, i, panel, tile);
      tile.row = batch * p.m + first_row + rows.tiles.first(i);
      if (by_interval) {
        store_intervals(p, tile, dots[tile.as_signed], terms, intervals);
      } else {
        store_tile(p, tile, dots[tile.as_signed], terms);
      }
    }
  }
}

void forward(const BinaryLinearParams& p, const BinaryLinearPlan& plan, int64_t begin,
             int64_t end) {
  for (int64_t index = begin; index < end; ++index) task(p, plan, index);
}

int64_t peak(int64_t steps) {
  constexpr int kSums = kTileRows * kPanelVecs;
  VecW sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = broadcast_word(0x9e3779b97f4a7c15u * (i + 1u));
  VecW other = sums[0] ^ sums[1];
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = count_add(sums[i], sums[i] & other);
    other += broadcast_word(1);
  }
  // Somewhere to go, or the compiler would leave it all out.
  std::memcpy(thread_scratch(sizeof(sums)), sums, sizeof(sums));
  return steps * kSums * kWordLanes * 64;
}

}  // namespace

#define FASTBB_TABLE_NAME(level) FASTBB_TABLE_NAME_(level)
#define FASTBB_TABLE_NAME_(level) binary_linear_##level

extern const BinaryLinearKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME);
const BinaryLinearKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME) = {forward, peak};

}  // namespace fastbb
