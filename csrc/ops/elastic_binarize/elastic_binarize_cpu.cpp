// SPDX-License-Identifier: Apache-2.0
// CPU kernels of elastic binarization, compiled once per instruction-set level.
//
// Forward: a task takes its rows in words of 64 elements. A word is compared a vector at a time;
// the masks of the comparisons are the bits of the planes, and choose among the three values that
// a result can have. Backward: bits become masks again, or x is compared once more; dx is written,
// and sums over rows are kept in the task's partial sums, which stay in the L1 cache.
// Bound: memory. Forward reads x and writes out and 1 to 3 bits per element; backward reads grad
// and these bits (or x) and writes dx.
#include "ops/elastic_binarize/elastic_binarize.h"

#include <cfloat>
#include <type_traits>

#include "core/mask.h"

namespace fastbb {
namespace {

constexpr int64_t kWord = 64;   // elements
constexpr int64_t kRun = 1024;  // elements whose products are added in float32

FASTBB_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

float alpha_of(const ElasticBinarizeParams& p) {
  if (p.alpha == nullptr) return 1.0f;
  return *p.alpha < kLeastAlpha ? kLeastAlpha : *p.alpha;  // NaN stays
}

// The largest |x'| at which |x' / alpha| is inside. A quotient of floats rounds to more than 1 just
// where its numerator is the larger, so x' need not be divided.
float inside_limit(float alpha, Ste ste) {
  if (alpha != alpha) return alpha;
  if (alpha > FLT_MAX) return FLT_MAX;  // infinity / infinity is not inside
  return ste == Ste::kClipOpen ? bit_cast<float>(bit_cast<uint32_t>(alpha) - 1) : alpha;
}

// A vector of elements, of which `count` exist where kWhole is false; the others are 0.
template <bool kWhole, class T>
FASTBB_INLINE VecF take(const T* from, int count) {
  if constexpr (kWhole) return load(from);
  return load_partial(from, count);
}
// A vector as its elements are stored, which results of few values are chosen in.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, float>, VecF, VecH>;
FASTBB_INLINE VecF stored(VecF v, float) { return v; }
template <class Half>
FASTBB_INLINE VecH stored(VecF v, Half half) {
  return narrow(v, half);
}

// v where T can hold all of it: half the instructions of a rounding for bfloat16.
template <class T>
FASTBB_INLINE Stored<T> stored_exactly(VecF v, T t) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __builtin_convertvector(bit_cast<VecU>(v) >> 16, VecH);
  } else {
    return stored(v, t);
  }
}

template <bool kWhole, class T>
FASTBB_INLINE void put(T* to, Stored<T> v, int count) {
  std::memcpy(to, &v, kWhole ? sizeof(v) : static_cast<size_t>(count) * sizeof(T));
}

// Calls body(offset, count, whole) for each vector of a word of n elements.
template <class Body>
FASTBB_INLINE void for_vectors(int64_t n, const Body& body) {
  if (n == kWord) {
#pragma GCC unroll 4
    for (int i = 0; i < kWord; i += kLanes) body(i, kLanes, std::true_type{});
    return;
  }
  for (int i = 0; i < n; i += kLanes) {
    body(i, static_cast<int>(least(kLanes, n - i)), std::false_type{});
  }
}

// ---- values ----

struct Value {
  Mask positive, negative;  // of signs; unsigned: 1, and unused
};

template <BitKind kKind>
FASTBB_INLINE Value value_of(VecF x, float alpha) {
  const VecF zero{};
  switch (kKind) {
    case BitKind::kPlus:
      return {at_least(x, zero), Mask{}};
    case BitKind::kMinus:
      return {above(x, zero), Mask{}};
    case BitKind::kTernary:
      return {above(x, zero), above(zero, x)};
    case BitKind::kUnsigned:
      return {above(x, broadcast(alpha / 2)), Mask{}};
  }
}

// A value times a number, given what 1, -1 and 0 times it are.
template <BitKind kKind, class Vec>
FASTBB_INLINE Vec times_value(Value v, Vec one, Vec minus, Vec zero) {
  if constexpr (kKind == BitKind::kUnsigned) return select(v.positive, one, zero);
  if constexpr (kKind == BitKind::kTernary) {
    return select(v.positive, one, select(v.negative, minus, zero));
  }
  return select(v.positive, one, minus);
}
template <BitKind kKind>
FASTBB_INLINE VecF number_of(Value v) {
  return times_value<kKind>(v, broadcast(1.0f), broadcast(-1.0f), VecF{});
}

// ---- forward ----

template <class T, BitKind kKind>
void forward_row(const ElasticBinarizeParams& p, float alpha, float limit, int64_t row) {
  const bool inside = has_inside_plane(kKind, p.ste);
  const int64_t k = p.k, bytes = bit_row_bytes(k);
  const float* shift = p.shift;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row;
  T* out = p.out == nullptr ? nullptr : static_cast<T*>(p.out) + row * k;
  uint8_t* planes =
      p.planes == nullptr ? nullptr : p.planes + row * bytes * elastic_planes(kKind, p.ste);
  const Stored<T> one = stored(broadcast(alpha), T{}), minus = stored(broadcast(-alpha), T{}),
                  zero = stored(broadcast(alpha * 0.0f), T{});

  for (int64_t c = 0; c < k; c += kWord) {
    const int64_t n = least(kWord, k - c);
    uint64_t positive = 0, negative = 0, passes = 0;
    for_vectors(n, [&](int i, int count, auto whole) __attribute__((always_inline)) {
      VecF v = take<whole>(x + c + i, count);
      if (shift != nullptr) v += take<whole>(shift + c + i, count);
      const Value value = value_of<kKind>(v, alpha);
      positive |= uint64_t{bits_of(value.positive)} << i;
      if constexpr (kKind == BitKind::kTernary) {
        negative |= uint64_t{bits_of(value.negative)} << i;
      }
      if (inside) passes |= uint64_t{bits_of(at_least(broadcast(limit), absolute(v)))} << i;
      if (out != nullptr) {
        put<whole>(out + c + i, times_value<kKind>(value, one, minus, zero), count);
      }
    });
    if (planes == nullptr) continue;
    // Rows of bits are of two words each, so the last may bring an empty one along.
    const uint64_t exist = n == kWord ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
    const bool pad = c + kWord >= k && c / kWord % 2 == 0;
    const auto write = [&](int plane, uint64_t word) __attribute__((always_inline)) {
      uint8_t* to = planes + plane * bytes + c / 8;
      word &= exist;
      std::memcpy(to, &word, sizeof(word));
      if (pad) std::memset(to + sizeof(word), 0, sizeof(word));
    };
    write(0, positive);
    if constexpr (kKind == BitKind::kTernary) write(1, negative);
    if (inside) write(bit_planes(kKind), passes);
  }
}

template <class T, BitKind kKind>
void forward_tasks(const ElasticBinarizeParams& p, const ElasticBinarizePlan& plan, int64_t begin,
                   int64_t end) {
  const float alpha = alpha_of(p), limit = inside_limit(alpha, p.ste);
  const int64_t last = least(end * plan.rows_per_task, p.rows);
  for (int64_t row = begin * plan.rows_per_task; row < last; ++row) {
    forward_row<T, kKind>(p, alpha, limit, row);
  }
}

// ---- backward ----

// By what grad is multiplied.
struct Factors {
  VecF dx, dalpha;
};

// Factors from planes: every kind and ste that does not need x.
template <BitKind kKind>
class Planes {
 public:
  static constexpr bool kExact = true;  // dx is grad, 0 or NaN

  explicit Planes(const ElasticBinarizeParams& p)
      : p_(p),
        inside_(has_inside_plane(kKind, p.ste)),
        bytes_(bit_row_bytes(p.k)),
        row_bytes_(bytes_ * elastic_planes(kKind, p.ste)) {}

  FASTBB_INLINE void seek(int64_t row, int64_t column) {
    const uint8_t* at = p_.planes + row * row_bytes_ + column / 8;
    positive_ = load_as<uint64_t>(at);
    if constexpr (kKind == BitKind::kTernary) negative_ = load_as<uint64_t>(at + bytes_);
    passes_ = inside_ ? load_as<uint64_t>(at + bit_planes(kKind) * bytes_) : ~uint64_t{0};
  }
  template <bool kWhole>
  FASTBB_INLINE Factors at(int i, int) const {
    const Value value{part(positive_, i), part(negative_, i)};
    return {select(part(passes_, i), broadcast(1.0f), VecF{}), number_of<kKind>(value)};
  }

 private:
  static FASTBB_INLINE Mask part(uint64_t word, int i) {
    return mask_of(static_cast<uint32_t>(word >> i));
  }

  const ElasticBinarizeParams& p_;
  bool inside_;
  int64_t bytes_, row_bytes_;
  uint64_t positive_ = 0, negative_ = 0, passes_ = 0;
};

// Factors from x: unsigned values, and signs with kBiReal.
template <class T, BitKind kKind>
class Inputs {
 public:
  static constexpr bool kExact = kKind == BitKind::kUnsigned;

  explicit Inputs(const ElasticBinarizeParams& p)
      : p_(p), alpha_(alpha_of(p)), limit_(inside_limit(alpha_, Ste::kClip)) {}

  FASTBB_INLINE void seek(int64_t row, int64_t column) {
    x_ = static_cast<const T*>(p_.x) + row * p_.x_row + column;
    shift_ = p_.shift == nullptr ? nullptr : p_.shift + column;
  }
  template <bool kWhole>
  FASTBB_INLINE Factors at(int i, int count) const {
    VecF x = take<kWhole>(x_ + i, count);
    if (shift_ != nullptr) x += take<kWhole>(shift_ + i, count);
    const VecF u = x / broadcast(alpha_), zero{}, one = broadcast(1.0f);
    const VecF value = number_of<kKind>(value_of<kKind>(x, alpha_));
    if constexpr (kKind == BitKind::kUnsigned) {
      const Mask below = above(zero, x), beyond = above(x, broadcast(limit_));
      const VecF passes = select(at_least(x, zero), one, zero);
      return {select(at_least(broadcast(limit_), x), passes, zero),
              select(below, zero, select(beyond, one, value - u))};
    }
    const VecF size = absolute(u);
    return {select(at_least(one, size), 2.0f - 2.0f * size, zero), value};
  }

 private:
  const ElasticBinarizeParams& p_;
  float alpha_, limit_;
  const T* x_ = nullptr;
  const float* shift_ = nullptr;
};

template <class T, class Source>
void backward_tasks(const ElasticBinarizeParams& p, const ElasticBinarizePlan& plan, int64_t begin,
                    int64_t end) {
  Source source(p);
  const int64_t k = p.k;
  for (int64_t task = begin; task < end; ++task) {
    float* sums = p.partial_shift == nullptr ? nullptr : p.partial_shift + task * k;
    if (sums != nullptr) std::memset(sums, 0, static_cast<size_t>(k) * sizeof(float));
    double dalpha = 0;
    const int64_t last = least((task + 1) * plan.rows_per_task, p.rows);
    for (int64_t row = task * plan.rows_per_task; row < last; ++row) {
      const T* grad = static_cast<const T*>(p.grad) + row * p.grad_row;
      T* dx = static_cast<T*>(p.dx) + row * k;
      for (int64_t run = 0; run < k; run += kRun) {
        VecF products{};
        const int64_t run_end = least(run + kRun, k);
        for (int64_t c = run; c < run_end; c += kWord) {
          source.seek(row, c);
          for_vectors(least(kWord, run_end - c), [&](int i, int count,
                                                     auto whole) __attribute__((always_inline)) {
            const VecF g = take<whole>(grad + c + i, count);
            const Factors f = source.template at<whole>(i, count);
            const VecF d = f.dx * g;
            const Stored<T> result = Source::kExact ? stored_exactly(d, T{}) : stored(d, T{});
            put<whole>(dx + c + i, result, count);
            if (sums != nullptr) {
              put<whole>(sums + c + i, take<whole>(sums + c + i, count) + d, count);
            }
            products += f.dalpha * g;
          });
        }
        dalpha += reduce_add(products);
      }
    }
    if (p.partial_alpha != nullptr) p.partial_alpha[task] = dalpha;
  }
}

void reduce(const ElasticBinarizeParams& p, const ElasticBinarizePlan& plan, int64_t begin,
            int64_t end) {
  const int64_t first = begin * kElasticColumns, last = least(end * kElasticColumns, p.k);
  for (int64_t c = first; c < last; c += kLanes) {
    const int count = static_cast<int>(least(kLanes, last - c));
    VecF sum{};
    for (int64_t task = 0; task < plan.tasks; ++task) {
      sum += load_partial(p.partial_shift + task * p.k + c, count);
    }
    store_partial(p.dshift + c, sum, count);
  }
}

// ---- which of them ----

using Tasks = void (*)(const ElasticBinarizeParams&, const ElasticBinarizePlan&, int64_t, int64_t);

template <class T, BitKind kKind>
Tasks backward_of(Ste ste) {
  if constexpr (is_signed(kKind)) {
    if (!needs_x(kKind, ste)) return backward_tasks<T, Planes<kKind>>;
  }
  return backward_tasks<T, Inputs<T, kKind>>;
}

template <class T>
Tasks forward_for(BitKind kind) {
  switch (kind) {
    case BitKind::kPlus:
      return forward_tasks<T, BitKind::kPlus>;
    case BitKind::kMinus:
      return forward_tasks<T, BitKind::kMinus>;
    case BitKind::kTernary:
      return forward_tasks<T, BitKind::kTernary>;
    case BitKind::kUnsigned:
      return forward_tasks<T, BitKind::kUnsigned>;
  }
  return nullptr;
}

template <class T>
Tasks backward_for(BitKind kind, Ste ste) {
  switch (kind) {
    case BitKind::kPlus:
      return backward_of<T, BitKind::kPlus>(ste);
    case BitKind::kMinus:
      return backward_of<T, BitKind::kMinus>(ste);
    case BitKind::kTernary:
      return backward_of<T, BitKind::kTernary>(ste);
    case BitKind::kUnsigned:
      return backward_of<T, BitKind::kUnsigned>(ste);
  }
  return nullptr;
}

void forward(const ElasticBinarizeParams& p, const ElasticBinarizePlan& plan, int64_t begin,
             int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return forward_for<float>(p.kind)(p, plan, begin, end);
    case Dtype::kBFloat16:
      return forward_for<BFloat16>(p.kind)(p, plan, begin, end);
    case Dtype::kFloat16:
      return forward_for<Float16>(p.kind)(p, plan, begin, end);
  }
}

void backward(const ElasticBinarizeParams& p, const ElasticBinarizePlan& plan, int64_t begin,
              int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return backward_for<float>(p.kind, p.ste)(p, plan, begin, end);
    case Dtype::kBFloat16:
      return backward_for<BFloat16>(p.kind, p.ste)(p, plan, begin, end);
    case Dtype::kFloat16:
      return backward_for<Float16>(p.kind, p.ste)(p, plan, begin, end);
  }
}

}  // namespace

#define FASTBB_TABLE_NAME(level) FASTBB_TABLE_NAME_(level)
#define FASTBB_TABLE_NAME_(level) elastic_binarize_##level

extern const ElasticBinarizeKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME);
const ElasticBinarizeKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME) = {forward, backward, reduce};

}  // namespace fastbb
