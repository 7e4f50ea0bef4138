#include "kernels/cuda/scratch.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/base/check.h"

namespace dejavu::cuda {

// Recorded launches know the old memory, so they are recorded anew.
void Scratch::Grow(Buffer& buffer, int64_t bytes) {
  if (buffer.bytes() >= bytes) return;
  CHECK(!queue_.capturing()) << "scratch grows to " << bytes << " bytes while ops are recorded";
  staging_.Wait();
  recordings_.ForgetGraphs();
  buffer = Buffer();
  auto grown = queue_.Allocate(bytes);
  if (!grown.ok()) throw std::runtime_error(std::string(grown.status().message()));
  buffer = *std::move(grown);
}

}  // namespace dejavu::cuda
