// SPDX-License-Identifier: Apache-2.0
// Runs CUDA code of a family on a case from a file, all numbers int64:
//
//   options, and each of them; the seed; words of the parameters, and each of them; buffers, and of
//   each its address, its bytes, and its contents
//
// Words of the parameters that are addresses within a buffer are replaced by addresses here. The
// contents of all buffers afterwards go to a second file.
#include "case.h"

namespace {

void read(std::FILE* file, void* to, size_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, file) != bytes) simt::stop("the case is cut off");
}

int64_t read_number(std::FILE* file) {
  int64_t number;
  read(file, &number, sizeof number);
  return number;
}

std::vector<int64_t> read_numbers(std::FILE* file) {
  std::vector<int64_t> numbers(static_cast<size_t>(read_number(file)));
  read(file, numbers.data(), numbers.size() * sizeof numbers[0]);
  return numbers;
}

struct Buffer {
  int64_t address, bytes;
  unsigned char* data;  // of its own, so that AddressSanitizer guards both ends
};

int64_t replaced(int64_t word, const std::vector<Buffer>& buffers) {
  for (const Buffer& buffer : buffers) {
    if (word < buffer.address || word > buffer.address + buffer.bytes) continue;
    return reinterpret_cast<int64_t>(buffer.data + (word - buffer.address));
  }
  return word;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) simt::stop("needs a case and a file for results");
  std::FILE* file = std::fopen(argv[1], "rb");
  if (file == nullptr) simt::stop("no such case");
  simt::Case given;
  given.options = read_numbers(file);
  simt::seed(static_cast<uint64_t>(read_number(file)));
  given.words = read_numbers(file);
  std::vector<Buffer> buffers(static_cast<size_t>(read_number(file)));
  for (Buffer& buffer : buffers) {
    buffer.address = read_number(file);
    buffer.bytes = read_number(file);
    buffer.data = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(buffer.bytes)));
    read(file, buffer.data, static_cast<size_t>(buffer.bytes));
  }
  std::fclose(file);
  for (int64_t& word : given.words) word = replaced(word, buffers);

  if (const char* problem = simt::run(given)) simt::stop(problem);
  file = std::fopen(argv[2], "wb");
  if (file == nullptr) simt::stop("the results cannot be written");
  for (const Buffer& buffer : buffers) {
    std::fwrite(buffer.data, 1, static_cast<size_t>(buffer.bytes), file);
  }
  return std::fclose(file);
}
