#include "tests/kernels/group/group_behaviours.h"

#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

using Random = std::mt19937_64;

// SplitMix64: most of a test's time goes into making numbers.
uint64_t Next(uint64_t* state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

uint64_t State(uint64_t seed, int rank) { return seed * 1000003 + rank * 0x632be59bd9b4e019; }

// What `rank` brings: values of very different sizes, so that every other order of adding gives other bits.
std::vector<float> Values(uint64_t seed, int rank, int64_t count) {
  constexpr float kScales[] = {0x1p-40f, 0x1p-36f, 0x1p-33f, 0x1p-32f, 0x1p-31f, 0x1p-30f, 0x1p-25f, 0x1p-20f};
  uint64_t state = State(seed, rank);
  std::vector<float> values(count);
  for (float& value : values) {
    const uint64_t bits = Next(&state);
    value = static_cast<float>(static_cast<int32_t>(bits)) * kScales[bits >> 61];
  }
  return values;
}

std::vector<char> Bytes(uint64_t seed, int rank, int64_t count) {
  uint64_t state = State(seed, rank);
  std::vector<char> bytes(count);
  for (char& byte : bytes) byte = static_cast<char>(Next(&state));
  return bytes;
}

void Mix(const void* data, int64_t bytes, uint64_t* bits) {
  for (int64_t i = 0; i < bytes; ++i) *bits = (*bits ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3;
}

std::string AllReduces(Communicator& group, int64_t rows, int64_t cols, int64_t padding, uint64_t seed,
                       uint64_t* bits) {
  const int64_t stride = cols + padding;
  std::vector<float> x = Values(seed, group.rank(), rows * stride);
  std::vector<float> expected = x;
  for (int64_t row = 0; row < rows; ++row) std::fill_n(expected.begin() + row * stride, cols, 0.0f);
  for (int rank = 0; rank < group.size(); ++rank) {
    const std::vector<float> theirs = Values(seed, rank, rows * stride);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = row * stride; i < row * stride + cols; ++i) {
        expected[i] = rank == 0 ? theirs[i] : expected[i] + theirs[i];
      }
    }
  }
  group.AllReduce({x.data(), DType::kFloat32, rows, cols, stride});
  Mix(x.data(), x.size() * sizeof(float), bits);
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::memcmp(&x[i], &expected[i], sizeof(float)) != 0) {
      return absl::StrCat("rank ", group.rank(), ", AllReduce of ", rows, " x ", cols, " with stride ", stride,
                          ": element ", i, " is ", x[i], " instead of ", expected[i]);
    }
  }
  return "";
}

std::string Broadcasts(Communicator& group, int64_t size, uint64_t seed, uint64_t* bits) {
  std::vector<char> data = Bytes(seed, group.rank(), size);
  group.Broadcast(data.data(), size);
  Mix(data.data(), size, bits);
  if (data == Bytes(seed, 0, size)) return "";
  return absl::StrCat("rank ", group.rank(), ", Broadcast of ", size, " bytes: not those of rank 0");
}

std::string Gathers(Communicator& group, int64_t size, uint64_t seed, uint64_t* bits) {
  const std::vector<char> mine = Bytes(seed, group.rank(), size);
  std::vector<char> all(group.rank() == 0 ? group.size() * size : 0);
  group.Gather(group.rank() == 0 ? all.data() : nullptr, mine.data(), size);
  Mix(all.data(), all.size(), bits);
  for (int rank = 0; group.rank() == 0 && rank < group.size(); ++rank) {
    const std::vector<char> theirs = Bytes(seed, rank, size);
    if (!std::equal(theirs.begin(), theirs.end(), all.begin() + rank * size)) {
      return absl::StrCat("Gather of ", size, " bytes: not those of rank ", rank);
    }
  }
  return "";
}

}  // namespace

std::string SumsInTheOrderOfRanks(Communicator& group) {
  uint64_t seed = 1, bits = 0;
  for (const int64_t rows : {0, 1, 2, 5, 16}) {
    for (const int64_t cols : {0, 1, 7, 768, 2048, 9216}) {
      for (const int64_t padding : {0, 1, 16}) {
        std::string wrong = AllReduces(group, rows, cols, padding, seed++, &bits);
        if (!wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

std::string BroadcastsWhatRankZeroHas(Communicator& group) {
  uint64_t seed = 1, bits = 0;
  for (const int64_t size : {0, 1, 5, 4096, 65535, 65536, 65537, 300000, 3000000}) {
    std::string wrong = Broadcasts(group, size, seed++, &bits);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

std::string GathersInTheOrderOfRanks(Communicator& group) {
  uint64_t seed = 1, bits = 0;
  for (const int64_t size : {0, 1, 5, 4096, 65535, 65536, 65537, 300000, 3000000}) {
    std::string wrong = Gathers(group, size, seed++, &bits);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

std::string DoesRandomCalls(Communicator& group, int calls, uint64_t seed, uint64_t* bits) {
  uint64_t unused = 0;
  if (bits == nullptr) bits = &unused;
  Random random(seed);
  for (int call = 0; call < calls; ++call) {
    const uint64_t kind = random() % 4, late = random() % 256, most = random() % 50 == 0 ? 70000 : 1500;
    const uint64_t size = random() % most;
    if (late == static_cast<uint64_t>(group.rank())) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    const uint64_t values = random();
    std::string wrong;
    if (kind == 0) {
      wrong = Broadcasts(group, size, values, bits);
    } else if (kind == 1) {
      wrong = Gathers(group, size, values, bits);
    } else {
      const int64_t rows = 1 + random() % 4, padding = random() % 3;
      wrong = AllReduces(group, rows, size / rows, padding, values, bits);
    }
    if (!wrong.empty()) return absl::StrCat("call ", call, " of seed ", seed, ": ", wrong);
  }
  return "";
}

}  // namespace dejavu
