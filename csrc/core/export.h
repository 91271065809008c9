// SPDX-License-Identifier: Apache-2.0
// Symbols are hidden by default; FASTBB_EXPORT marks what _ops and _C take from the kernel library.
#pragma once

#define FASTBB_EXPORT __attribute__((visibility("default")))
