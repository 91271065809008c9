// SPDX-License-Identifier: Apache-2.0
// Where the tokens of a problem lie, and packing them for the register tiles.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/simd.h"
#include "ops/window_attention/window_attention.h"

namespace fastbb {
namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Cuts one allocation into 64-byte aligned pieces; with a null base it only measures.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Element offset of token t of side `map` in image b and head g, for real tokens.
struct Token {
  int32_t y, x;  // y = -1: padding
};

// Tokens of one problem.
struct Tokens {
  int64_t image = -1, window = -1;
  Token* keys = nullptr;      // [nk] (full domain: unused)
  int32_t* region = nullptr;  // [nk rounded up]: side of the shift boundary on both axes
  bool has_regions = false;
};

// Fills places and regions of problem `window` of image `image`.
inline void locate(const WindowAttentionParams& p, int64_t image, int64_t window, Tokens& t) {
  t.image = image;
  t.window = window;
  t.has_regions = false;
  if (p.full) return;
  const int iy = static_cast<int>(window / p.windows_x);
  const int ix = static_cast<int>(window % p.windows_x);
  const bool roll_first = p.pad_mode == PadMode::kRollThenPad;
  const int64_t roll_h = roll_first ? p.map_h : int64_t{p.windows_y} * p.window_h;
  const int64_t roll_w = roll_first ? p.map_w : int64_t{p.windows_x} * p.window_w;
  // One axis: rolled coordinate -> map coordinate or -1.
  const auto place = [roll_first](int64_t rolled, int shift, int64_t length, int map) -> int32_t {
    if (roll_first && rolled >= map) return -1;
    int64_t at = rolled + shift;
    at = at >= length ? at - length : at;
    // A map narrower than the shift wraps more than once in roll_then_pad order.
    if (at >= length) at %= length;
    return at < map ? static_cast<int32_t>(at) : -1;
  };
  int32_t* region = t.region;
  Token* token = t.keys;
  const bool last_row = iy == p.windows_y - 1;
  const bool last_column = ix == p.windows_x - 1;
  t.has_regions = p.swin_mask && (last_row || last_column);
  for (int a = 0; a < p.window_h; ++a) {
    const int32_t y = place(int64_t{iy} * p.window_h + a, p.shift_h, roll_h, p.map_h);
    const int32_t row_side = last_row && a >= p.window_h - p.shift_h ? 2 : 0;
    for (int c = 0; c < p.window_w; ++c, ++token, ++region) {
      const int32_t x = place(int64_t{ix} * p.window_w + c, p.shift_w, roll_w, p.map_w);
      *token = {y < 0 || x < 0 ? -1 : y, x};
      *region = row_side + (last_column && c >= p.window_w - p.shift_w ? 1 : 0);
    }
  }
}

inline bool is_real(const WindowAttentionParams& p, const Tokens& t, int64_t token) {
  return p.full || t.keys[token].y >= 0;
}

// Address of a key-side (or map query) token; it must be real.
template <class T>
FASTBB_INLINE T* token_at(const WindowAttentionParams& p, const Tokens& t, const TokenMap& map,
                          int64_t head, int64_t token) {
  T* base = static_cast<T*>(map.data) + t.image * map.image + head * map.head;
  if (p.full) return base + token * map.column;
  return base + t.keys[token].y * map.row + t.keys[token].x * map.column;
}

// Address of a query: on the map, or in the list that the windows of an image share.
template <class T>
FASTBB_INLINE T* query_at(const WindowAttentionParams& p, const Tokens& t, const TokenMap& map,
                          int64_t head, int64_t token) {
  if (!p.q_shared) return token_at<T>(p, t, map, head, token);
  return static_cast<T*>(map.data) + t.image * map.image + head * map.head + token * map.column;
}

// d elements -> float32, zero-filled up to ld.
template <class T>
FASTBB_INLINE void load_row(const T* from, int64_t d, int64_t ld, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) store(to + c, load(from + c));
  if (c < d) {
    store(to + c, load_partial(from + c, static_cast<int>(d - c)));
    c += kLanes;
  }
  for (; c < ld; c += kLanes) store(to + c, VecF{});
}

// factor * row, narrowed to the element type.
template <class T>
FASTBB_INLINE void store_row(const float* from, int64_t d, float factor, T* to) {
  const VecF f = broadcast(factor);
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) store(to + c, load(from + c) * f);
  if (c < d) store_partial(to + c, load(from + c) * f, static_cast<int>(d - c));
}

FASTBB_INLINE float dot_rows(const float* a, const float* b, int64_t ld) {
  VecF sum{};
  for (int64_t c = 0; c < ld; c += kLanes) sum += load(a + c) * load(b + c);
  return reduce_add(sum);
}

FASTBB_INLINE void scale_row(float* row, float factor, int64_t ld) {
  for (int64_t c = 0; c < ld; c += kLanes) store(row + c, load(row + c) * factor);
}

FASTBB_INLINE void add_row(float* to, const float* from, int64_t ld) {
  for (int64_t c = 0; c < ld; c += kLanes) store(to + c, load(to + c) + load(from + c));
}

// Scales the row to unit length and returns 1 / max(length, eps).
FASTBB_INLINE float normalise_row(float* row, int64_t ld) {
  const float length = std::sqrt(dot_rows(row, row, ld));
  const float inverse = 1.0f / (length < kL2NormEps ? kL2NormEps : length);
  scale_row(row, inverse, ld);
  return inverse;
}

// Gradient through normalise_row, in place: g <- (g - y (y.g)) * inverse; below eps the length is
// a constant and the first factor is the identity.
FASTBB_INLINE void normalise_row_backward(float* grad, const float* unit, float inverse,
                                          int64_t ld) {
  const bool clamped = inverse >= 1.0f / kL2NormEps;
  const float along = clamped ? 0.0f : dot_rows(grad, unit, ld);
  for (int64_t c = 0; c < ld; c += kLanes) {
    store(grad + c, (load(grad + c) - load(unit + c) * along) * inverse);
  }
}

// Rows of a head are short (two cache lines at d = 32 in float32) and far apart, which hardware
// prefetchers follow badly: asks for the row `ahead` elements further.
template <class T>
FASTBB_INLINE void prefetch_row(const WindowAttentionParams& p, const T* row, int64_t ahead) {
  for (int64_t c = 0; c < p.head_dim; c += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + ahead + c);
  }
}

// From a row to the row of the next window.
inline int64_t next_window(const WindowAttentionParams& p, const TokenMap& map) {
  return p.window_w * map.column;
}

// From a row to the row of the next head, or of the next window's first head.
inline int64_t next_head(const WindowAttentionParams& p, const TokenMap& map, int64_t head) {
  return head + 1 < p.heads ? map.head : next_window(p, map) - (p.heads - 1) * map.head;
}

// Keys or values [first, first + n) of one head -> float32 rows [zeros_to, ld]; padding takes `pad`
// [h, d] (null: zeros), rows from n to zeros_to are zeros. `ahead` is for prefetch_row.
template <class T>
void pack_rows(const WindowAttentionParams& p, const Tokens& t, const TokenMap& map,
               const float* pad, int64_t head, int64_t first, int64_t n, int64_t zeros_to,
               int64_t ld, int64_t ahead, float* rows) {
  const int64_t d = p.head_dim;
  for (int64_t i = 0; i < n; ++i) {
    float* row = rows + i * ld;
    if (is_real(p, t, first + i)) {
      const T* from = token_at<const T>(p, t, map, head, first + i);
      prefetch_row(p, from, ahead);
      load_row(from, d, ld, row);
    } else if (pad != nullptr) {
      load_row(pad + head * d, d, ld, row);
    } else {
      for (int64_t c = 0; c < ld; c += kLanes) store(row + c, VecF{});
    }
  }
  for (int64_t i = n; i < zeros_to; ++i) {
    for (int64_t c = 0; c < ld; c += kLanes) store(rows + i * ld + c, VecF{});
  }
}

// ---- what is added to the scaled logits of one query ----

// Relative position bias of query token i for keys [first, first + n), from the flipped table:
// for a fixed key row the entries of its keys are contiguous and ascending. Writes whole vectors,
// up to kLanes floats beyond the end of the row.
inline void expand_bias_row(const WindowAttentionParams& p, int64_t head, int64_t query,
                            int64_t first, int64_t n, float* row) {
  const int wh = p.window_h, ww = p.window_w;
  const int table_w = 2 * ww - 1;
  const float* table = p.table + head * (2 * wh - 1) * table_w;
  const int64_t ih = query / ww, iw = query % ww;
  int64_t jh = first / ww, jw = first % ww;
  for (int64_t j = 0; j < n; ++jh, jw = 0) {
    const int64_t run = smaller(ww - jw, n - j);
    const float* from = table + (wh - 1 - ih + jh) * table_w + (ww - 1 - iw + jw);
    int64_t c = 0;
    for (; c + kLanes <= run; c += kLanes) store(row + j + c, load(from + c));
    if (c < run) store(row + j + c, load_partial(from + c, static_cast<int>(run - c)));
    j += run;
  }
}

// Adds the logit gradients of one query to the (flipped) table gradient of its head.
inline void collapse_bias_row(const WindowAttentionParams& p, int64_t query, const float* row,
                              float* table) {
  const int wh = p.window_h, ww = p.window_w;
  const int table_w = 2 * ww - 1;
  const int64_t ih = query / ww, iw = query % ww;
  for (int64_t jh = 0; jh < wh; ++jh) {
    float* to = table + (wh - 1 - ih + jh) * table_w + (ww - 1 - iw);
    const float* from = row + jh * ww;
    int64_t c = 0;
    for (; c + kLanes <= ww; c += kLanes) store(to + c, load(to + c) + load(from + c));
    if (c < ww) {
      const int rest = static_cast<int>(ww - c);
      store_partial(to + c, load_partial(to + c, rest) + load_partial(from + c, rest), rest);
    }
  }
}

inline float scale_of(const WindowAttentionParams& p, int64_t head) {
  return p.scale_per_head != nullptr ? p.scale_per_head[head] : p.scale;
}

struct LogitTerms {
  float scale;
  const float* bias;  // of this query, from the first key of the block; may be null
  const float* mask;  // likewise
  const int32_t* region;
  int32_t query_region;
  float region_value;
};

// scale * s + bias + mask for the kLanes keys from j on; `n` < kLanes of them exist.
template <bool kPartial>
FASTBB_INLINE VecF apply_terms(VecF s, const LogitTerms& t, int64_t j, int n) {
  s = s * t.scale;
  if (t.bias != nullptr) s += kPartial ? load_partial(t.bias + j, n) : load(t.bias + j);
  if (t.mask != nullptr) s += kPartial ? load_partial(t.mask + j, n) : load(t.mask + j);
  if (t.region != nullptr) {
    const VecI other = load_as<VecI>(t.region + j) != broadcast(t.query_region);
    s = other ? s + t.region_value : s;
  }
  return s;
}

}  // namespace
}  // namespace fastbb
