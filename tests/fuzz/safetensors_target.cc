// safetensors: a file as it is, a header whose length is right, and a directory of an index with two shards. The first
// byte says which, and how many bytes of data there are.
#include <algorithm>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "tests/engine/formats/checkpoint_files.h"
#include "tests/fuzz/stored_tensors.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

// Tensors of one file share no byte, and where all are known, leave none of the data out.
void CheckCover(const std::string& path, const FileTensors& file) {
  std::vector<std::pair<int64_t, int64_t>> extents;
  int64_t bytes = 0;
  for (const auto& [name, tensor] : file.tensors) {
    CHECK(!file.foreign.contains(name)) << name;
    if (tensor.elements == 0) continue;
    extents.emplace_back(tensor.offset, tensor.offset + tensor.elements * SizeOf(tensor.dtype));
    bytes += extents.back().second - extents.back().first;
  }
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i) CHECK(extents[i].first >= extents[i - 1].second) << "tensors overlap";
  const int64_t size = static_cast<int64_t>(std::filesystem::file_size(path));
  if (!file.foreign.empty() || extents.empty()) return;
  CHECK(extents.back().second == size && extents.front().first == size - bytes) << "bytes of no tensor";
}

void Run(absl::string_view bytes) {
  const std::vector<absl::StatusCode> refusals = {absl::StatusCode::kInvalidArgument};
  static const FuzzFiles& files = *new FuzzFiles;
  FuzzInput input(bytes);
  const uint8_t kind = input.Byte();
  const size_t data_bytes = kind / 3;  // which tensors must cover to the last
  if (kind % 3 < 2) {
    const std::string file(input.Rest());
    const std::string path =
        files.Write("one.safetensors", kind % 3 == 0 ? file : Safetensors(file, std::string(data_bytes, '\1')));
    const absl::StatusOr<FileTensors> contents = ReadSafetensorsHeader(path);
    CheckAnswer(contents.status(), refusals);
    if (!contents.ok()) return;
    CheckTensors(contents->tensors);
    CheckCover(path, *contents);
    return;
  }
  static const FuzzFiles& directory = *new FuzzFiles;
  directory.Write("model.safetensors.index.json", input.Section());
  directory.Write("a.safetensors", Safetensors(std::string(input.Section()), std::string(data_bytes, '\1')));
  directory.Write("b.safetensors", Safetensors(std::string(input.Section()), std::string(data_bytes, '\2')));
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(directory.path());
  CheckAnswer(checkpoint.status(), {absl::StatusCode::kInvalidArgument, absl::StatusCode::kNotFound});
  if (!checkpoint.ok()) return;
  CheckTensors(checkpoint->tensors());
  for (const auto& [name, tensor] : checkpoint->tensors()) {
    CHECK(checkpoint->Find(name) == &tensor) << name;
    CHECK(tensor.file->path() == directory.path() + "/a.safetensors" ||
          tensor.file->path() == directory.path() + "/b.safetensors")
        << "the index led to " << tensor.file->path();
  }
}

}  // namespace

FuzzTarget SafetensorsTarget() {
  const std::string f16 = R"("w":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]})";
  const std::string more = R"("b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},)"
                           R"("c":{"dtype":"I8","shape":[0,7],"data_offsets":[16,16]},)"
                           R"("d":{"dtype":"I64","shape":[2],"data_offsets":[16,32]},)"
                           R"("e":{"dtype":"BF16","shape":[1,1,2],"data_offsets":[32,36]})";
  const std::string header = absl::StrCat(R"({"__metadata__":{"key":"value","format":"pt"},)", f16, ",", more, "}");
  const std::string index = R"({"metadata":{"total_size":12},"weight_map":{"w":"a.safetensors","e":"b.safetensors"}})";
  // Twelve bytes too, of other tensors.
  const std::string other = R"("b":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
                            R"("c":{"dtype":"I8","shape":[0,7],"data_offsets":[4,4]},)"
                            R"("d":{"dtype":"I32","shape":[1],"data_offsets":[4,8]},)"
                            R"("e":{"dtype":"BF16","shape":[1,1,2],"data_offsets":[8,12]})";
  const std::string one(1, 3 * 12 + 1), shards(1, 3 * 12 + 2);
  return {"safetensors",
          4096,
          Run,
          {Raw("\0") + Safetensors(header, std::string(36, '\3')), one + "{" + f16 + "}", one + "{" + other + "}",
           "\1{}", absl::StrCat(shards, index, "\x1e{", f16, "}\x1e{", other, "}"),
           absl::StrCat("\2", R"({"weight_map":{"w":"../x.safetensors"}})", "\x1e{}\x1e{}")},
          {"\"dtype\":",
           "\"shape\":",
           "\"data_offsets\":",
           "\"F32\"",
           "\"F16\"",
           "\"BF16\"",
           "\"I8\"",
           "\"I64\"",
           "[0,0]",
           "[]",
           "[4294967296,4294967296]",
           "18446744073709551615",
           "9223372036854775807",
           "-1",
           "1e3",
           "__metadata__",
           "\"weight_map\":",
           "a.safetensors",
           "b.safetensors",
           "\x1e",
           "null",
           "{\"w\":{"}};
}

}  // namespace dejavu
