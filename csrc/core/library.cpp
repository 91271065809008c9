// SPDX-License-Identifier: Apache-2.0
// The operator library. Families add their schemas as fragments beside their host code.
#include "core/torch_api.h"

STABLE_TORCH_LIBRARY(fastbb, m) { (void)m; }
