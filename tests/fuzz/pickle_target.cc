// A pickle by itself, without the archive around it.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/formats/torch_pickle.h"
#include "tests/engine/formats/checkpoint_files.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

void Run(absl::string_view pickle) {
  const auto tensors = ReadTorchPickle(pickle);
  CheckAnswer(tensors.status(), {absl::StatusCode::kInvalidArgument});
  if (!tensors.ok()) return;
  CHECK(tensors->size() <= pickle.size()) << tensors->size() << " tensors";
  for (const auto& tensor : *tensors) {
    CHECK(tensor.shape.size() == tensor.strides.size()) << tensor.name;
    CHECK(tensor.storage_elements >= 0 && tensor.offset >= 0) << tensor.name;
    for (const int64_t dimension : tensor.shape) CHECK(dimension >= 0) << tensor.name;
    for (const int64_t stride : tensor.strides) CHECK(stride >= 0) << tensor.name;
  }
}

}  // namespace

FuzzTarget PickleTarget() {
  const std::string half = PickledStorage("HalfStorage", "0", 6), longs = PickledStorage("LongStorage", "1", 2);
  const std::string weight = PickledTensor(half, 0, {2, 3}, {3, 1});
  // OrderedDict with memo and state, as torch writes it.
  const std::string ordered =
      absl::StrCat("\x80\x02", PickledGlobal("collections", "OrderedDict"), ")Rq", std::string(1, '\0'), "(",
                   PickledString("w"), weight, "uh", std::string(1, '\0'), "0}b.");
  const std::string parameter = absl::StrCat(PickledGlobal("torch._utils", "_rebuild_parameter"), weight, "\x88",
                                             PickledGlobal("collections", "OrderedDict"), ")R\x87R");
  const std::string protocol4 = absl::StrCat("\x80\x04\x95", Little(20, 8),
                                             "}\x94(\x8c\x01w\x8c\x0b"
                                             "collections\x8c\x0bOrderedDict\x93)Ru.");
  return {"pickle",
          4096,
          Run,
          {PickledDict({{"w", weight}, {"b", PickledTensor(half, 3, {3}, {1})}}), PickledDict({{"w", parameter}}),
           PickledDict({{"step", PickledTensor(longs, 0, {2}, {1})}}), ordered, protocol4,
           PickledDict({{"w", PickledGlobal("os", "system")}}),
           Raw("\x80\x02}(X\x01\0\0\0aK\x01M\x02\0J\x03\0\0\0\x8a\0G12345678u.")},
          {PickledGlobal("torch._utils", "_rebuild_tensor_v2"),
           PickledGlobal("torch._utils", "_rebuild_parameter"),
           PickledGlobal("collections", "OrderedDict"),
           PickledGlobal("torch", "BFloat16Storage"),
           PickledString("storage"),
           "Q",
           "R",
           "(",
           "t",
           "u",
           "e",
           "}",
           "]",
           ")",
           "\x85",
           "\x86",
           "\x87",
           "\x88",
           "\x89",
           "\x93",
           "\x94",
           "h\x01",
           "q\x01",
           "K\x01",
           "M\xff\xff",
           "J\xff\xff\xff\xff",
           "\x8a\x08",
           "G",
           "N",
           "a",
           "s",
           "b",
           ".",
           weight,
           half}};
}

}  // namespace dejavu
