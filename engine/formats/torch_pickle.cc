// A pickle is a program for a stack machine. This machine runs the opcodes that torch.save writes (protocol 2, and
// their successors up to protocol 4), whose results are plain values. Values live in one array and refer to each other
// by index, so that sharing costs nothing, cycles do no harm and nothing recurses. Counts are bounded: every opcode
// makes at most one value, and values, stack, marks and memo have limits.
#include "engine/formats/torch_pickle.h"

#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr size_t kMaxValues = 1'000'000;  // a tensor takes about 30
constexpr size_t kMaxStack = 1'000'000;
constexpr size_t kMaxMarks = 1'000;
constexpr size_t kMaxNameBytes = 1'000;

enum class Callable { kOrderedDict, kRebuildTensor, kRebuildParameter, kStorageType };

// Everything that a pickle may name.
struct Global {
  absl::string_view module;
  absl::string_view name;
  Callable callable;
  std::optional<DType> dtype;
};
constexpr Global kGlobals[] = {
    {"collections", "OrderedDict", Callable::kOrderedDict, {}},
    {"torch._utils", "_rebuild_tensor_v2", Callable::kRebuildTensor, {}},
    {"torch._utils", "_rebuild_parameter", Callable::kRebuildParameter, {}},
    {"torch", "FloatStorage", Callable::kStorageType, DType::kFloat32},
    {"torch", "HalfStorage", Callable::kStorageType, DType::kFloat16},
    {"torch", "BFloat16Storage", Callable::kStorageType, DType::kBFloat16},
    {"torch", "DoubleStorage", Callable::kStorageType, {}},
    {"torch", "LongStorage", Callable::kStorageType, {}},
    {"torch", "IntStorage", Callable::kStorageType, {}},
    {"torch", "ShortStorage", Callable::kStorageType, {}},
    {"torch", "CharStorage", Callable::kStorageType, {}},
    {"torch", "ByteStorage", Callable::kStorageType, {}},
    {"torch", "BoolStorage", Callable::kStorageType, {}},
};

using Ref = uint32_t;  // index of a value

enum class Kind : uint8_t { kNone, kBool, kInt, kFloat, kString, kTuple, kList, kDict, kGlobal, kStorage, kTensor };
constexpr const char* kKindNames[] = {"None",   "a bool",       "an integer", "a float",   "a string", "a tuple",
                                      "a list", "a dictionary", "a global",   "a storage", "a tensor"};

struct Value {
  Kind kind = Kind::kNone;
  int64_t number = 0;            // int; global: index in kGlobals; storage: elements
  absl::string_view text = {};   // string; storage: key. Points into the pickle
  const Global* type = nullptr;  // global; storage: its element type
  std::vector<Ref> items =
      {};  // tuple, list; dictionary: key, value, key, ...; tensor: storage, offset, shape, strides
};

class Machine {
 public:
  explicit Machine(absl::string_view pickle) : pickle_(pickle) {}

  absl::StatusOr<std::vector<PickledTensor>> Run();

 private:
  // Status of one opcode; true at the end of the program.
  absl::StatusOr<bool> Step();
  absl::StatusOr<bool> StepMemo(uint8_t opcode);
  absl::StatusOr<bool> StepContainer(uint8_t opcode);

  absl::Status Refuse(absl::string_view reason) const;

  // The program.
  absl::StatusOr<absl::string_view> Bytes(uint64_t count);
  absl::StatusOr<uint64_t> Number(int width);
  absl::StatusOr<absl::string_view> Line();

  // The stack. A pop never reaches below the innermost mark.
  absl::Status Push(Ref ref);
  absl::Status PushValue(Value value);
  absl::StatusOr<Ref> Pop();
  absl::StatusOr<Ref> Top();
  absl::StatusOr<std::vector<Ref>> PopToMark();

  absl::Status PushInteger(absl::StatusOr<uint64_t> number, int width);
  absl::Status PushString(int length_width);
  absl::Status PushTuple(int count);
  absl::Status PushGlobal(absl::string_view module, absl::string_view name);
  absl::Status Extend(Kind kind, std::vector<Ref> items);
  absl::Status PersistentId();
  absl::Status Reduce();
  absl::Status Build();

  bool Is(Ref ref, Kind kind) const { return values_[ref].kind == kind; }
  absl::StatusOr<int64_t> Count(Ref ref) const;
  absl::StatusOr<std::vector<int64_t>> Counts(Ref ref) const;
  absl::StatusOr<PickledTensor> Describe(Ref tensor) const;
  absl::StatusOr<std::vector<PickledTensor>> StateDictionary(Ref result) const;

  const absl::string_view pickle_;
  size_t at_ = 0;      // next byte of the program
  size_t opcode_ = 0;  // where the current opcode stands, for messages
  std::vector<Value> values_;
  std::vector<Ref> stack_;
  std::vector<size_t> marks_;  // stack heights
  absl::flat_hash_map<uint64_t, Ref> memo_;
};

absl::Status Machine::Refuse(absl::string_view reason) const {
  return absl::InvalidArgumentError(absl::StrCat("pickle, byte ", opcode_, ": ", reason));
}

absl::StatusOr<absl::string_view> Machine::Bytes(uint64_t count) {
  if (count > pickle_.size() - at_) return Refuse("breaks off");
  const absl::string_view bytes = pickle_.substr(at_, count);
  at_ += count;
  return bytes;
}

absl::StatusOr<uint64_t> Machine::Number(int width) {
  ASSIGN_OR_RETURN(const absl::string_view bytes, Bytes(width));
  uint64_t number = 0;
  for (int i = width - 1; i >= 0; --i) number = number << 8 | static_cast<uint8_t>(bytes[i]);
  return number;
}

absl::StatusOr<absl::string_view> Machine::Line() {
  const size_t length = pickle_.substr(at_, kMaxNameBytes).find('\n');
  if (length == absl::string_view::npos) return Refuse("a name that does not end");
  const absl::string_view line = pickle_.substr(at_, length);
  at_ += length + 1;
  return line;
}

absl::Status Machine::Push(Ref ref) {
  if (stack_.size() >= kMaxStack) return Refuse(absl::StrCat("a stack of more than ", kMaxStack, " values"));
  stack_.push_back(ref);
  return absl::OkStatus();
}

absl::Status Machine::PushValue(Value value) {
  if (values_.size() >= kMaxValues) return Refuse(absl::StrCat("more than ", kMaxValues, " values"));
  values_.push_back(std::move(value));
  return Push(static_cast<Ref>(values_.size() - 1));
}

absl::StatusOr<Ref> Machine::Top() {
  if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) return Refuse("takes from an empty stack");
  return stack_.back();
}

absl::StatusOr<Ref> Machine::Pop() {
  ASSIGN_OR_RETURN(const Ref ref, Top());
  stack_.pop_back();
  return ref;
}

absl::StatusOr<std::vector<Ref>> Machine::PopToMark() {
  if (marks_.empty()) return Refuse("needs a mark where there is none");
  const auto first = stack_.begin() + static_cast<ptrdiff_t>(marks_.back());
  std::vector<Ref> items(first, stack_.end());
  stack_.erase(first, stack_.end());
  marks_.pop_back();
  return items;
}

absl::Status Machine::PushInteger(absl::StatusOr<uint64_t> number, int width) {
  if (!number.ok()) return number.status();
  // Two's complement of `width` bytes; the empty integer of LONG1 is 0.
  const int shift = 64 - 8 * width;
  const int64_t value = width == 0 ? 0 : static_cast<int64_t>(*number << shift) >> shift;
  return PushValue({.kind = Kind::kInt, .number = value});
}

absl::Status Machine::PushString(int length_width) {
  ASSIGN_OR_RETURN(const uint64_t length, Number(length_width));
  ASSIGN_OR_RETURN(const absl::string_view text, Bytes(length));
  return PushValue({.kind = Kind::kString, .text = text});
}

absl::Status Machine::PushTuple(int count) {
  std::vector<Ref> items(count);
  for (int i = count - 1; i >= 0; --i) {
    ASSIGN_OR_RETURN(items[i], Pop());
  }
  return PushValue({.kind = Kind::kTuple, .items = std::move(items)});
}

absl::Status Machine::PushGlobal(absl::string_view module, absl::string_view name) {
  for (const Global& global : kGlobals) {
    if (global.module == module && global.name == name) return PushValue({.kind = Kind::kGlobal, .type = &global});
  }
  return Refuse(absl::StrCat("names ", Quoted(absl::StrCat(module, ".", name)),
                             "; only tensors, storages and ordered dictionaries are read, and nothing is executed"));
}

// Appends to the list or dictionary on top of the stack.
absl::Status Machine::Extend(Kind kind, std::vector<Ref> items) {
  ASSIGN_OR_RETURN(const Ref target, Top());
  if (!Is(target, kind)) return Refuse(absl::StrCat("adds to ", kKindNames[static_cast<int>(values_[target].kind)]));
  if (kind == Kind::kDict && items.size() % 2 != 0) return Refuse("a key without a value");
  std::vector<Ref>& all = values_[target].items;
  all.insert(all.end(), items.begin(), items.end());
  return absl::OkStatus();
}

// ("storage", type, key, location, elements)
absl::Status Machine::PersistentId() {
  ASSIGN_OR_RETURN(const Ref id, Pop());
  const std::vector<Ref>& fields = values_[id].items;
  if (!Is(id, Kind::kTuple) || fields.size() != 5 || !Is(fields[0], Kind::kString) ||
      values_[fields[0]].text != "storage" || !Is(fields[1], Kind::kGlobal) ||
      values_[fields[1]].type->callable != Callable::kStorageType || !Is(fields[2], Kind::kString) ||
      values_[fields[2]].text.size() > kMaxNameBytes) {
    return Refuse("a persistent id that is not a storage");
  }
  ASSIGN_OR_RETURN(const int64_t elements, Count(fields[4]));
  return PushValue(
      {.kind = Kind::kStorage, .number = elements, .text = values_[fields[2]].text, .type = values_[fields[1]].type});
}

absl::Status Machine::Reduce() {
  ASSIGN_OR_RETURN(const Ref arguments, Pop());
  ASSIGN_OR_RETURN(const Ref callable, Pop());
  if (!Is(callable, Kind::kGlobal) || !Is(arguments, Kind::kTuple)) return Refuse("a call of what cannot be called");
  const std::vector<Ref>& items = values_[arguments].items;
  switch (values_[callable].type->callable) {
    case Callable::kOrderedDict:
      if (!items.empty()) return Refuse("an OrderedDict with arguments");
      return PushValue({.kind = Kind::kDict});
    case Callable::kRebuildTensor:  // (storage, offset, shape, strides, requires_grad, hooks[, metadata])
      if (items.size() < 6 || items.size() > 7 || !Is(items[0], Kind::kStorage)) {
        return Refuse("a tensor without a storage and the rest of its arguments");
      }
      return PushValue({.kind = Kind::kTensor, .items = {items.begin(), items.begin() + 4}});
    case Callable::kRebuildParameter:  // (tensor, requires_grad, hooks)
      if (items.size() != 3 || !Is(items[0], Kind::kTensor)) return Refuse("a parameter without a tensor");
      return Push(items[0]);
    case Callable::kStorageType:
      break;
  }
  return Refuse("a storage type is called");
}

// State beside the entries of a state dictionary: torch's _metadata. It holds module versions, which the engine does
// not use.
absl::Status Machine::Build() {
  ASSIGN_OR_RETURN(const Ref state, Pop());
  ASSIGN_OR_RETURN(const Ref target, Top());
  if (!Is(state, Kind::kDict) || !Is(target, Kind::kDict))
    return Refuse("sets the state of something not a dictionary");
  return absl::OkStatus();
}

absl::StatusOr<bool> Machine::StepMemo(uint8_t opcode) {
  const bool put = opcode == 'q' || opcode == 'r' || opcode == 0x94;
  uint64_t index = memo_.size();
  if (opcode != 0x94) {
    ASSIGN_OR_RETURN(index, Number(opcode == 'q' || opcode == 'h' ? 1 : 4));
  }
  if (put) {
    ASSIGN_OR_RETURN(memo_[index], Top());
    if (memo_.size() > kMaxValues) return Refuse(absl::StrCat("a memo of more than ", kMaxValues, " values"));
    return false;
  }
  const auto found = memo_.find(index);
  if (found == memo_.end()) return Refuse(absl::StrCat("memo ", index, ", which was never set"));
  RETURN_IF_ERROR(Push(found->second));
  return false;
}

absl::StatusOr<bool> Machine::StepContainer(uint8_t opcode) {
  std::vector<Ref> items;
  switch (opcode) {
    case '(':  // MARK
      if (marks_.size() >= kMaxMarks) return Refuse(absl::StrCat("more than ", kMaxMarks, " nested marks"));
      marks_.push_back(stack_.size());
      return false;
    case 't': {  // TUPLE
      ASSIGN_OR_RETURN(items, PopToMark());
      RETURN_IF_ERROR(PushValue({.kind = Kind::kTuple, .items = std::move(items)}));
      return false;
    }
    case 'e':    // APPENDS
    case 'u': {  // SETITEMS
      ASSIGN_OR_RETURN(items, PopToMark());
      RETURN_IF_ERROR(Extend(opcode == 'e' ? Kind::kList : Kind::kDict, std::move(items)));
      return false;
    }
    case 'a': {  // APPEND
      ASSIGN_OR_RETURN(const Ref value, Pop());
      RETURN_IF_ERROR(Extend(Kind::kList, {value}));
      return false;
    }
    default: {  // 's', SETITEM
      ASSIGN_OR_RETURN(const Ref value, Pop());
      ASSIGN_OR_RETURN(const Ref key, Pop());
      RETURN_IF_ERROR(Extend(Kind::kDict, {key, value}));
      return false;
    }
  }
}

absl::StatusOr<bool> Machine::Step() {
  opcode_ = at_;
  ASSIGN_OR_RETURN(const uint64_t opcode, Number(1));
  absl::Status status;
  switch (opcode) {
    case '.':  // STOP
      return true;
    case 0x80: {  // PROTO
      ASSIGN_OR_RETURN(const uint64_t protocol, Number(1));
      if (protocol < 2 || protocol > 5) return Refuse(absl::StrCat("protocol ", protocol, "; 2 to 5 are read"));
      return false;
    }
    case 0x95:  // FRAME: a length for readers of streams
      status = Bytes(8).status();
      break;
    case 'q':  // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
    case 'r':
    case 0x94:
    case 'h':
    case 'j':
      return StepMemo(static_cast<uint8_t>(opcode));
    case '(':
    case 't':
    case 'e':
    case 'u':
    case 'a':
    case 's':
      return StepContainer(static_cast<uint8_t>(opcode));
    case 'N':  // NONE
      status = PushValue({});
      break;
    case 0x88:  // NEWTRUE, NEWFALSE
    case 0x89:
      status = PushValue({.kind = Kind::kBool});
      break;
    case 'K':  // BININT1, BININT2: unsigned
      status = PushInteger(Number(1), 8);
      break;
    case 'M':
      status = PushInteger(Number(2), 8);
      break;
    case 'J':  // BININT
      status = PushInteger(Number(4), 4);
      break;
    case 0x8a: {  // LONG1
      ASSIGN_OR_RETURN(const uint64_t width, Number(1));
      if (width > 8) return Refuse(absl::StrCat("an integer of ", width, " bytes; the limit is 8"));
      status = PushInteger(Number(static_cast<int>(width)), static_cast<int>(width));
      break;
    }
    case 'G':  // BINFLOAT; no float of a state dictionary matters here
      status = Bytes(8).status();
      if (status.ok()) status = PushValue({.kind = Kind::kFloat});
      break;
    case 0x8c:  // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
      status = PushString(1);
      break;
    case 'X':
      status = PushString(4);
      break;
    case 0x8d:
      status = PushString(8);
      break;
    case '}':  // EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE
      status = PushValue({.kind = Kind::kDict});
      break;
    case ']':
      status = PushValue({.kind = Kind::kList});
      break;
    case ')':
      status = PushTuple(0);
      break;
    case 0x85:  // TUPLE1, TUPLE2, TUPLE3
    case 0x86:
    case 0x87:
      status = PushTuple(static_cast<int>(opcode - 0x84));
      break;
    case 'c': {  // GLOBAL
      ASSIGN_OR_RETURN(const absl::string_view module, Line());
      ASSIGN_OR_RETURN(const absl::string_view name, Line());
      status = PushGlobal(module, name);
      break;
    }
    case 0x93: {  // STACK_GLOBAL
      ASSIGN_OR_RETURN(const Ref name, Pop());
      ASSIGN_OR_RETURN(const Ref module, Pop());
      if (!Is(name, Kind::kString) || !Is(module, Kind::kString)) return Refuse("a global without a name");
      status = PushGlobal(values_[module].text, values_[name].text);
      break;
    }
    case 'Q':  // BINPERSID
      status = PersistentId();
      break;
    case 'R':
      status = Reduce();
      break;
    case 'b':
      status = Build();
      break;
    default:
      return Refuse(absl::StrCat("opcode 0x", absl::Hex(opcode), ", which torch.save does not write for tensors"));
  }
  if (!status.ok()) return status;
  return false;
}

absl::StatusOr<int64_t> Machine::Count(Ref ref) const {
  const Value& value = values_[ref];
  if (value.kind != Kind::kInt) return Refuse(absl::StrCat(kKindNames[static_cast<int>(value.kind)], " for a count"));
  if (value.number < 0) return Refuse(absl::StrCat("a count of ", value.number));
  return value.number;
}

absl::StatusOr<std::vector<int64_t>> Machine::Counts(Ref ref) const {
  if (!Is(ref, Kind::kTuple)) return Refuse("a shape that is not a tuple");
  // Before anything is copied: a shape may be shared by many tensors.
  if (values_[ref].items.size() > kMaxDimensions) {
    return Refuse(absl::StrCat(values_[ref].items.size(), " dimensions; the limit is ", kMaxDimensions));
  }
  std::vector<int64_t> counts;
  for (const Ref item : values_[ref].items) {
    ASSIGN_OR_RETURN(const int64_t count, Count(item));
    counts.push_back(count);
  }
  return counts;
}

absl::StatusOr<PickledTensor> Machine::Describe(Ref ref) const {
  const std::vector<Ref>& items = values_[ref].items;
  const Value& storage = values_[items[0]];
  PickledTensor tensor;
  tensor.dtype = storage.type->dtype;
  tensor.storage = std::string(storage.text);
  tensor.storage_elements = storage.number;
  ASSIGN_OR_RETURN(tensor.offset, Count(items[1]));
  ASSIGN_OR_RETURN(tensor.shape, Counts(items[2]));
  ASSIGN_OR_RETURN(tensor.strides, Counts(items[3]));
  if (tensor.shape.size() != tensor.strides.size()) return Refuse("a shape and strides of different length");
  return tensor;
}

absl::StatusOr<std::vector<PickledTensor>> Machine::StateDictionary(Ref result) const {
  if (!Is(result, Kind::kDict)) {
    return Refuse(
        absl::StrCat("holds ", kKindNames[static_cast<int>(values_[result].kind)], ", not a dictionary of tensors"));
  }
  const std::vector<Ref>& items = values_[result].items;
  std::vector<PickledTensor> tensors;
  absl::flat_hash_set<absl::string_view> names;
  for (size_t i = 0; i < items.size(); i += 2) {
    if (!Is(items[i], Kind::kString)) return Refuse("a key that is not a string");
    const absl::string_view name = values_[items[i]].text;
    if (name.size() > kMaxNameBytes) return Refuse(absl::StrCat("a name of ", name.size(), " bytes"));
    const Value& value = values_[items[i + 1]];
    if (value.kind != Kind::kTensor) {
      return Refuse(absl::StrCat("entry ", Quoted(name), " is ", kKindNames[static_cast<int>(value.kind)],
                                 "; the file must hold the state dictionary itself, a dictionary of tensors"));
    }
    if (!names.insert(name).second) return Refuse(absl::StrCat("tensor ", Quoted(name), " appears twice"));
    absl::StatusOr<PickledTensor> tensor = Describe(items[i + 1]);
    if (!tensor.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), ": ", tensor.status().message()));
    }
    tensor->name = std::string(name);
    tensors.push_back(*std::move(tensor));
  }
  return tensors;
}

absl::StatusOr<std::vector<PickledTensor>> Machine::Run() {
  for (bool stopped = false; !stopped;) {
    ASSIGN_OR_RETURN(stopped, Step());
  }
  ASSIGN_OR_RETURN(const Ref result, Pop());
  if (!stack_.empty() || !marks_.empty()) return Refuse("ends with values left over");
  return StateDictionary(result);
}

}  // namespace

absl::StatusOr<std::vector<PickledTensor>> ReadTorchPickle(absl::string_view pickle) { return Machine(pickle).Run(); }

}  // namespace dejavu
