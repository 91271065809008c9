// SPDX-License-Identifier: Apache-2.0
// Runs window attention's CUDA code of one element type, FASTBB_SIMT_MATH, on a case from a file:
//
//   int64 backward, many_blocks, seed; the parameters; int64 buffers; per buffer int64 address,
//   bytes, and its contents
//
// Words of the parameters that are addresses within a buffer are replaced by addresses here. The
// contents of all buffers afterwards go to a second file.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ops/window_attention/window_attention_cuda_backward_launch.cuh"
#include "ops/window_attention/window_attention_cuda_launch.cuh"

namespace fastbb {
namespace {

using Math = cuda::FASTBB_SIMT_MATH;

void stop(const char* why) {
  std::fprintf(stderr, "simt: %s\n", why);
  std::exit(2);
}

void read(std::FILE* file, void* to, size_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, file) != bytes) stop("the case is cut off");
}

int64_t read_number(std::FILE* file) {
  int64_t number;
  read(file, &number, sizeof number);
  return number;
}

struct Buffer {
  int64_t address, bytes;
  unsigned char* data;  // of its own, so that AddressSanitizer guards both ends
};

void replace_addresses(WindowAttentionParams& p, const std::vector<Buffer>& buffers) {
  auto* words = reinterpret_cast<int64_t*>(&p);
  for (size_t i = 0; i < sizeof p / sizeof *words; ++i) {
    for (const Buffer& buffer : buffers) {
      if (words[i] < buffer.address || words[i] > buffer.address + buffer.bytes) continue;
      words[i] = reinterpret_cast<int64_t>(buffer.data + (words[i] - buffer.address));
      break;
    }
  }
}

const char* run_backward(const WindowAttentionParams& p, int64_t many_blocks) {
  const auto plan = window_attention_cuda_backward_plan(p, many_blocks);
  const auto floats = static_cast<size_t>(plan.workspace);
  auto* workspace = static_cast<float*>(std::malloc(floats * sizeof(float)));
  std::memset(workspace, 0xff, floats * sizeof(float));
  const char* problem = cuda::launch_backward<Math>(p, plan, workspace, nullptr);
  std::free(workspace);
  return problem;
}

}  // namespace
}  // namespace fastbb

int main(int argc, char** argv) {
  using namespace fastbb;
  if (argc != 3) stop("needs a case and a file for results");
  std::FILE* file = std::fopen(argv[1], "rb");
  if (file == nullptr) stop("no such case");
  const bool backward = read_number(file) != 0;
  const int64_t many_blocks = read_number(file);
  simt::seed(static_cast<uint64_t>(read_number(file)));
  WindowAttentionParams p;
  read(file, &p, sizeof p);
  std::vector<Buffer> buffers(static_cast<size_t>(read_number(file)));
  for (Buffer& buffer : buffers) {
    buffer.address = read_number(file);
    buffer.bytes = read_number(file);
    buffer.data = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(buffer.bytes)));
    read(file, buffer.data, static_cast<size_t>(buffer.bytes));
  }
  std::fclose(file);
  replace_addresses(p, buffers);

  const char* problem =
      backward ? run_backward(p, many_blocks)
               : cuda::launch_forward<Math>(p, window_attention_cuda_plan(p, many_blocks), nullptr);
  if (problem != nullptr) stop(problem);
  file = std::fopen(argv[2], "wb");
  if (file == nullptr) stop("the results cannot be written");
  for (const Buffer& buffer : buffers) {
    std::fwrite(buffer.data, 1, static_cast<size_t>(buffer.bytes), file);
  }
  return std::fclose(file);
}
