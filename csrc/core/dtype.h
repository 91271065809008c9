// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fastbb {

// Element types that kernels read and write.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace fastbb
