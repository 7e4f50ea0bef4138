// A PyTorch checkpoint: an archive as it is, a pickle in an archive that is right, and a directory of an index with two
// shards.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "tests/engine/formats/checkpoint_files.h"
#include "tests/fuzz/stored_tensors.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

std::string Archive(const std::string& pickle) {
  return ZipFile()
      .Add("model/data.pkl", pickle)
      .Add("model/byteorder", "little")
      .Add("model/data/0", std::string(12, '\1'))
      .Add("model/data/1", std::string(16, '\2'))
      .Bytes();
}

void Run(absl::string_view bytes) {
  static const FuzzFiles& files = *new FuzzFiles;
  FuzzInput input(bytes);
  const uint8_t kind = input.Byte();
  if (kind % 3 < 2) {
    const std::string file(input.Rest());
    const std::string path = files.Write("model.bin", kind % 3 == 0 ? file : Archive(file));
    const absl::StatusOr<FileTensors> file_tensors = ReadTorchArchive(path);
    CheckAnswer(file_tensors.status(), {absl::StatusCode::kInvalidArgument, absl::StatusCode::kDataLoss});
    if (file_tensors.ok()) CheckTensors(file_tensors->tensors);
    return;
  }
  static const FuzzFiles& directory = *new FuzzFiles;
  directory.Write("pytorch_model.bin.index.json", input.Section());
  directory.Write("a.bin", Archive(std::string(input.Section())));
  directory.Write("b.bin", Archive(std::string(input.Section())));
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(directory.path());
  CheckAnswer(checkpoint.status(), {absl::StatusCode::kInvalidArgument, absl::StatusCode::kNotFound});
  if (checkpoint.ok()) CheckTensors(checkpoint->tensors());
}

}  // namespace

FuzzTarget ZipTarget() {
  const std::string weight = PickledTensor(PickledStorage("HalfStorage", "0", 6), 0, {2, 3}, {3, 1});
  const std::string bias = PickledTensor(PickledStorage("FloatStorage", "1", 4), 1, {3}, {1});
  const std::string pickle = PickledDict({{"w", weight}, {"b", bias}});
  const std::string zero(1, '\0');
  const ZipFile plain =
      ZipFile().Add("m/data.pkl", pickle).Add("m/data/0", std::string(12, '\1')).Add("m/data/1", std::string(16, '\2'));
  return {
      "zip",
      4096,
      Run,
      {zero + plain.Bytes(), zero + plain.Zip64Bytes(), zero + Archive(pickle), zero + ZipFile().Bytes(), "\1" + pickle,
       "\1" + PickledDict({{"x", PickledTensor(PickledStorage("FloatStorage", "1", 4), 4, {0, 5}, {5, 1})}}),
       absl::StrCat("\2", R"({"weight_map":{"w":"a.bin","b":"b.bin"}})", "\x1e", PickledDict({{"w", weight}}), "\x1e",
                    PickledDict({{"b", bias}}))},
      {"PK\1\2", "PK\3\4", "PK\5\6", "PK\6\6", "PK\6\7", Raw("\1\0\x18\0"), "\xff\xff\xff\xff", "\xff\xff", "data.pkl",
       "m/data/0", "byteorder", "\"weight_map\":", "a.bin", "b.bin", "\x1e", weight, bias}};
}

}  // namespace dejavu
