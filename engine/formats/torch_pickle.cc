#include "engine/formats/torch_pickle.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "engine/formats/pickle_machine.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr size_t kMaxPickledDimensions = 8;  // a shape may be shared by many tensors

absl::StatusOr<std::vector<int64_t>> Counts(const PickleMachine& machine, PickleRef ref) {
  if (!machine.Is(ref, PickleKind::kTuple)) return machine.Refuse("a shape that is not a tuple");
  const size_t dimensions = machine.value(ref).items.size();
  if (dimensions > kMaxPickledDimensions) {  // before anything is copied
    return machine.Refuse(absl::StrCat(dimensions, " dimensions; the limit is ", kMaxPickledDimensions));
  }
  std::vector<int64_t> counts;
  for (const PickleRef item : machine.value(ref).items) {
    ASSIGN_OR_RETURN(const int64_t count, machine.Count(item));
    counts.push_back(count);
  }
  return counts;
}

absl::StatusOr<PickledTensor> Describe(const PickleMachine& machine, PickleRef ref) {
  const std::vector<PickleRef>& items = machine.value(ref).items;
  const PickleValue& storage = machine.value(items[0]);
  PickledTensor tensor;
  tensor.dtype = storage.type->dtype;
  tensor.type = std::string(storage.type->name);
  tensor.storage = std::string(storage.text);
  tensor.storage_elements = storage.number;
  ASSIGN_OR_RETURN(tensor.offset, machine.Count(items[1]));
  ASSIGN_OR_RETURN(tensor.shape, Counts(machine, items[2]));
  ASSIGN_OR_RETURN(tensor.strides, Counts(machine, items[3]));
  if (tensor.shape.size() != tensor.strides.size()) return machine.Refuse("a shape and strides of different length");
  return tensor;
}

absl::StatusOr<std::vector<PickledTensor>> StateDictionary(const PickleMachine& machine, PickleRef result) {
  if (!machine.Is(result, PickleKind::kDict)) {
    return machine.Refuse(absl::StrCat("holds ", machine.KindName(result), ", not a dictionary of tensors"));
  }
  const std::vector<PickleRef>& items = machine.value(result).items;
  std::vector<PickledTensor> tensors, others;
  absl::flat_hash_set<absl::string_view> names;
  for (size_t i = 0; i < items.size(); i += 2) {
    if (!machine.Is(items[i], PickleKind::kString)) return machine.Refuse("a key that is not a string");
    const absl::string_view name = machine.value(items[i]).text;
    if (name.size() > kMaxPickleNameBytes) return machine.Refuse(absl::StrCat("a name of ", name.size(), " bytes"));
    if (!names.insert(name).second) return machine.Refuse(absl::StrCat("tensor ", Quoted(name), " appears twice"));
    if (!machine.Is(items[i + 1], PickleKind::kTensor)) {
      PickledTensor other;  // a count of steps, say, which no weight is
      other.name = std::string(name);
      other.type = machine.KindName(items[i + 1]);
      others.push_back(std::move(other));
      continue;
    }
    absl::StatusOr<PickledTensor> tensor = Describe(machine, items[i + 1]);
    if (!tensor.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), ": ", tensor.status().message()));
    }
    tensor->name = std::string(name);
    tensors.push_back(*std::move(tensor));
  }
  if (tensors.empty() && !others.empty()) {
    return machine.Refuse(absl::StrCat("entry ", Quoted(others[0].name), " is ", others[0].type,
                                       "; the file must hold the state dictionary itself, a dictionary of tensors"));
  }
  std::move(others.begin(), others.end(), std::back_inserter(tensors));
  return tensors;
}

}  // namespace

absl::StatusOr<std::vector<PickledTensor>> ReadTorchPickle(absl::string_view pickle) {
  PickleMachine machine(pickle);
  ASSIGN_OR_RETURN(const PickleRef result, machine.Run());
  return StateDictionary(machine, result);
}

}  // namespace dejavu
