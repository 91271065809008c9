// SPDX-License-Identifier: Apache-2.0
// Kernels of packed bits, compiled for ARM and run under emulation, against plain loops over their
// definitions. Prints how many results were compared; exits with 1 at the first that differs.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "ops/binary_linear/binary_linear.h"
#include "ops/binary_pack/binary_pack.h"

namespace fastbb {

extern const BinaryLinearKernels binary_linear_baseline;
extern const BinaryPackKernels binary_pack_baseline;

namespace {

std::mt19937 generator(7);
int64_t compared = 0;

void require(bool same, const char* what, int64_t m, int64_t n, int64_t k, int kind) {
  ++compared;
  if (same) return;
  std::printf("%s differs at m %d, n %d, k %d, kind %d\n", what, int(m), int(n), int(k), kind);
  std::exit(1);
}

// Standard normal numbers, a tenth of them exactly zero.
std::vector<float> numbers(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& each : x) each = generator() % 10 == 0 ? 0.0f : normal(generator);
  return x;
}

constexpr float kAlpha = 0.8f;

int value(float x, BitKind kind) {
  switch (kind) {
    case BitKind::kPlus:
      return x >= 0 ? 1 : -1;
    case BitKind::kMinus:
      return x > 0 ? 1 : -1;
    case BitKind::kTernary:
      return (x > 0) - (x < 0);
    case BitKind::kUnsigned:
      return x > kAlpha / 2;
  }
  return 0;
}

// Packed by the kernel; every bit is compared.
std::vector<uint8_t> pack(const std::vector<float>& x, int64_t rows, int64_t k, BitKind kind) {
  const int planes = bit_planes(kind);
  std::vector<uint8_t> bits(static_cast<size_t>(rows * planes * bit_row_bytes(k)), 0xff);
  BinaryPackParams p{};
  p.kind = kind;
  p.x = x.data();
  p.x_row = k;
  p.alpha = &kAlpha;
  p.bits = bits.data();
  p.rows = rows;
  p.k = k;
  binary_pack_baseline.pack(p, {rows, 1}, 0, 1);
  for (int64_t r = 0; r < rows; ++r) {
    for (int plane = 0; plane < planes; ++plane) {
      const uint8_t* row = bits.data() + (r * planes + plane) * bit_row_bytes(k);
      for (int64_t i = 0; i < 8 * bit_row_bytes(k); ++i) {
        const bool set = i < k && value(x[r * k + i], kind) == (plane == 0 ? 1 : -1);
        require((row[i / 8] >> (i % 8) & 1) == set, "a bit", r, plane, k, int(kind));
      }
    }
  }
  return bits;
}

void products(int64_t m, int64_t n, int64_t k, BitKind a_kind, BitKind b_kind) {
  const std::vector<float> a = numbers(m * k), b = numbers(n * k);
  const std::vector<uint8_t> a_bits = pack(a, m, k, a_kind), b_bits = pack(b, n, k, b_kind);
  std::vector<int32_t> out(static_cast<size_t>(m * n), -12345);
  BinaryLinearParams p{};
  p.a = a_bits.data();
  p.a_row = bit_planes(a_kind) * bit_row_bytes(k);
  p.b = b_bits.data();
  p.a_kind = a_kind;
  p.b_kind = b_kind;
  p.batch = 1;
  p.m = m;
  p.n = n;
  p.k = k;
  p.out = out.data();
  binary_linear_baseline.forward(p, {m, (n + 31) / 32 * 32, 1, 1, 1}, 0, 1);
  for (int64_t i = 0; i < m * n; ++i) {
    int32_t exact = 0;
    for (int64_t j = 0; j < k; ++j) {
      exact += value(a[i / n * k + j], a_kind) * value(b[i % n * k + j], b_kind);
    }
    require(out[static_cast<size_t>(i)] == exact, "a product", m, n, k, int(a_kind));
  }
}

}  // namespace
}  // namespace fastbb

int main() {
  using namespace fastbb;
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 9, 64}, {7, 20, 131}, {5, 33, 768}, {2, 5, 2100}};
  for (const auto& [m, n, k] : shapes) {
    for (const auto a : {BitKind::kPlus, BitKind::kMinus, BitKind::kTernary, BitKind::kUnsigned}) {
      for (const auto b : {BitKind::kPlus, BitKind::kUnsigned}) products(m, n, k, a, b);
    }
  }
  std::printf("%lld results are right\n", static_cast<long long>(compared));
}
