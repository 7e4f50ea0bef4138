// libFuzzer's program for one target, DEJAVU_FUZZ_TARGET. `--write-seeds=DIRECTORY` writes what a run begins with: the
// target's own seeds in DIRECTORY/seeds, its words as DIRECTORY/words.dict, and its largest input as DIRECTORY/max_len.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "tests/fuzz/target.h"

namespace {

const dejavu::FuzzTarget& Target() {
  static const dejavu::FuzzTarget& target = *new dejavu::FuzzTarget(dejavu::DEJAVU_FUZZ_TARGET());
  return target;
}

void WriteSeeds(const std::string& directory) {
  std::filesystem::create_directories(directory + "/seeds");
  int number = 0;
  for (const std::string& seed : Target().seeds) {
    std::ofstream(absl::StrCat(directory, "/seeds/seed-", number++), std::ios::binary) << seed;
  }
  std::ofstream dictionary(directory + "/words.dict", std::ios::binary);
  for (const std::string& word : Target().words) {
    dictionary << '"';
    for (const char c : word) {
      char escaped[5];
      std::snprintf(escaped, sizeof escaped, "\\x%02x", static_cast<unsigned char>(c));
      dictionary << escaped;
    }
    dictionary << "\"\n";
  }
  std::ofstream(directory + "/max_len") << Target().max_bytes;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  for (int i = 1; i < *argc; ++i) {
    absl::string_view argument = (*argv)[i];
    if (!absl::ConsumePrefix(&argument, "--write-seeds=")) continue;
    WriteSeeds(std::string(argument));
    std::exit(0);
  }
  // What the target loads once is no part of the time that an input takes.
  Target().run("");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Target().run(absl::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}
