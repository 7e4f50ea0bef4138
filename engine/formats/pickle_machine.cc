#include "engine/formats/pickle_machine.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr size_t kMaxPickleValues = 1'000'000;  // a tensor takes about 30
constexpr size_t kMaxStack = 1'000'000;
constexpr size_t kMaxMarks = 1'000;
constexpr uint64_t kStop = '.';

// Everything that a pickle may name.
constexpr PickleGlobal kGlobals[] = {
    {"collections", "OrderedDict", PickleCallable::kOrderedDict, {}},
    {"torch._utils", "_rebuild_tensor_v2", PickleCallable::kRebuildTensor, {}},
    {"torch._utils", "_rebuild_parameter", PickleCallable::kRebuildParameter, {}},
    {"torch", "FloatStorage", PickleCallable::kStorageType, DType::kFloat32},
    {"torch", "HalfStorage", PickleCallable::kStorageType, DType::kFloat16},
    {"torch", "BFloat16Storage", PickleCallable::kStorageType, DType::kBFloat16},
    {"torch", "DoubleStorage", PickleCallable::kStorageType, {}},
    {"torch", "LongStorage", PickleCallable::kStorageType, {}},
    {"torch", "IntStorage", PickleCallable::kStorageType, {}},
    {"torch", "ShortStorage", PickleCallable::kStorageType, {}},
    {"torch", "CharStorage", PickleCallable::kStorageType, {}},
    {"torch", "ByteStorage", PickleCallable::kStorageType, {}},
    {"torch", "BoolStorage", PickleCallable::kStorageType, {}},
};

}  // namespace

absl::Status PickleMachine::Refuse(absl::string_view reason) const {
  return absl::InvalidArgumentError(absl::StrCat("pickle, byte ", opcode_, ": ", reason));
}

absl::StatusOr<absl::string_view> PickleMachine::Bytes(uint64_t count) {
  if (count > pickle_.size() - at_) return Refuse("breaks off");
  const absl::string_view bytes = pickle_.substr(at_, count);
  at_ += count;
  return bytes;
}

absl::StatusOr<uint64_t> PickleMachine::Number(int width) {
  ASSIGN_OR_RETURN(const absl::string_view bytes, Bytes(width));
  uint64_t number = 0;
  for (int i = width - 1; i >= 0; --i) number = number << 8 | static_cast<uint8_t>(bytes[i]);
  return number;
}

absl::StatusOr<absl::string_view> PickleMachine::Line() {
  const size_t length = pickle_.substr(at_, kMaxPickleNameBytes).find('\n');
  if (length == absl::string_view::npos) return Refuse("a name that does not end");
  const absl::string_view line = pickle_.substr(at_, length);
  at_ += length + 1;
  return line;
}

absl::Status PickleMachine::Push(Ref ref) {
  if (stack_.size() >= kMaxStack) return Refuse(absl::StrCat("a stack of more than ", kMaxStack, " values"));
  stack_.push_back(ref);
  return absl::OkStatus();
}

absl::Status PickleMachine::PushValue(PickleValue value) {
  if (values_.size() >= kMaxPickleValues) return Refuse(absl::StrCat("more than ", kMaxPickleValues, " values"));
  values_.push_back(std::move(value));
  return Push(static_cast<Ref>(values_.size() - 1));
}

absl::StatusOr<PickleRef> PickleMachine::Top() {
  if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) return Refuse("takes from an empty stack");
  return stack_.back();
}

absl::StatusOr<PickleRef> PickleMachine::Pop() {
  ASSIGN_OR_RETURN(const Ref ref, Top());
  stack_.pop_back();
  return ref;
}

absl::StatusOr<std::vector<PickleRef>> PickleMachine::PopToMark() {
  if (marks_.empty()) return Refuse("needs a mark where there is none");
  const auto first = stack_.begin() + static_cast<ptrdiff_t>(marks_.back());
  std::vector<Ref> items(first, stack_.end());
  stack_.erase(first, stack_.end());
  marks_.pop_back();
  return items;
}

absl::Status PickleMachine::PushInteger(absl::StatusOr<uint64_t> number, int width) {
  if (!number.ok()) return number.status();
  // Two's complement of `width` bytes; the empty integer of LONG1 is 0.
  const int shift = 64 - 8 * width;
  const int64_t value = width == 0 ? 0 : static_cast<int64_t>(*number << shift) >> shift;
  return PushValue({.kind = Kind::kInt, .number = value});
}

absl::Status PickleMachine::PushGlobal(absl::string_view module, absl::string_view name) {
  for (const PickleGlobal& global : kGlobals) {
    if (global.module == module && global.name == name) return PushValue({.kind = Kind::kGlobal, .type = &global});
  }
  return Refuse(absl::StrCat("names ", Quoted(absl::StrCat(module, ".", name)),
                             "; only tensors, storages and ordered dictionaries are read, and nothing is executed"));
}

absl::Status PickleMachine::Extend(Kind kind, std::vector<Ref> items) {
  ASSIGN_OR_RETURN(const Ref target, Top());
  if (!Is(target, kind)) return Refuse(absl::StrCat("adds to ", KindName(target)));
  if (kind == Kind::kDict && items.size() % 2 != 0) return Refuse("a key without a value");
  std::vector<Ref>& all = values_[target].items;
  all.insert(all.end(), items.begin(), items.end());
  return absl::OkStatus();
}

// ("storage", type, key, location, elements)
absl::Status PickleMachine::PersistentId() {
  ASSIGN_OR_RETURN(const Ref id, Pop());
  const std::vector<Ref>& fields = values_[id].items;
  if (!Is(id, Kind::kTuple) || fields.size() != 5 || !Is(fields[0], Kind::kString) ||
      values_[fields[0]].text != "storage" || !Is(fields[1], Kind::kGlobal) ||
      values_[fields[1]].type->callable != PickleCallable::kStorageType || !Is(fields[2], Kind::kString) ||
      values_[fields[2]].text.size() > kMaxPickleNameBytes) {
    return Refuse("a persistent id that is not a storage");
  }
  ASSIGN_OR_RETURN(const int64_t elements, Count(fields[4]));
  return PushValue(
      {.kind = Kind::kStorage, .number = elements, .text = values_[fields[2]].text, .type = values_[fields[1]].type});
}

absl::Status PickleMachine::Reduce() {
  ASSIGN_OR_RETURN(const Ref arguments, Pop());
  ASSIGN_OR_RETURN(const Ref callable, Pop());
  if (!Is(callable, Kind::kGlobal) || !Is(arguments, Kind::kTuple)) return Refuse("a call of what cannot be called");
  const std::vector<Ref>& items = values_[arguments].items;
  switch (values_[callable].type->callable) {
    case PickleCallable::kOrderedDict:
      if (!items.empty()) return Refuse("an OrderedDict with arguments");
      return PushValue({.kind = Kind::kDict});
    case PickleCallable::kRebuildTensor:  // (storage, offset, shape, strides, requires_grad, hooks[, metadata])
      if (items.size() < 6 || items.size() > 7 || !Is(items[0], Kind::kStorage)) {
        return Refuse("a tensor without a storage and the rest of its arguments");
      }
      return PushValue({.kind = Kind::kTensor, .items = {items.begin(), items.begin() + 4}});
    case PickleCallable::kRebuildParameter:  // (tensor, requires_grad, hooks)
      if (items.size() != 3 || !Is(items[0], Kind::kTensor)) return Refuse("a parameter without a tensor");
      return Push(items[0]);
    case PickleCallable::kStorageType:
      break;
  }
  return Refuse("a storage type is called");
}

// State beside the entries of a state dictionary: torch's _metadata. It holds module versions, which the engine does
// not use.
absl::Status PickleMachine::Build() {
  ASSIGN_OR_RETURN(const Ref state, Pop());
  ASSIGN_OR_RETURN(const Ref target, Top());
  if (!Is(state, Kind::kDict) || !Is(target, Kind::kDict))
    return Refuse("sets the state of something not a dictionary");
  return absl::OkStatus();
}

absl::Status PickleMachine::Protocol() {
  ASSIGN_OR_RETURN(const uint64_t protocol, Number(1));
  if (protocol < 2 || protocol > 5) return Refuse(absl::StrCat("protocol ", protocol, "; 2 to 5 are read"));
  return absl::OkStatus();
}

// A length for readers of streams.
absl::Status PickleMachine::Frame() { return Bytes(8).status(); }

absl::Status PickleMachine::PushLong() {
  ASSIGN_OR_RETURN(const uint64_t width, Number(1));
  if (width > 8) return Refuse(absl::StrCat("an integer of ", width, " bytes; the limit is 8"));
  return PushInteger(Number(static_cast<int>(width)), static_cast<int>(width));
}

// No float of a state dictionary matters here.
absl::Status PickleMachine::PushFloat() {
  RETURN_IF_ERROR(Bytes(8).status());
  return PushValue({.kind = Kind::kFloat});
}

template <int length_width>
absl::Status PickleMachine::PushString() {
  ASSIGN_OR_RETURN(const uint64_t length, Number(length_width));
  ASSIGN_OR_RETURN(const absl::string_view text, Bytes(length));
  return PushValue({.kind = Kind::kString, .text = text});
}

template <int count>
absl::Status PickleMachine::PushTuple() {
  std::vector<Ref> items(count);
  for (int i = count - 1; i >= 0; --i) {
    ASSIGN_OR_RETURN(items[i], Pop());
  }
  return PushValue({.kind = Kind::kTuple, .items = std::move(items)});
}

absl::Status PickleMachine::Mark() {
  if (marks_.size() >= kMaxMarks) return Refuse(absl::StrCat("more than ", kMaxMarks, " nested marks"));
  marks_.push_back(stack_.size());
  return absl::OkStatus();
}

absl::Status PickleMachine::PushTupleToMark() {
  ASSIGN_OR_RETURN(std::vector<Ref> items, PopToMark());
  return PushValue({.kind = Kind::kTuple, .items = std::move(items)});
}

template <PickleKind kind>
absl::Status PickleMachine::ExtendToMark() {
  ASSIGN_OR_RETURN(std::vector<Ref> items, PopToMark());
  return Extend(kind, std::move(items));
}

absl::Status PickleMachine::Append() {
  ASSIGN_OR_RETURN(const Ref value, Pop());
  return Extend(Kind::kList, {value});
}

absl::Status PickleMachine::SetItem() {
  ASSIGN_OR_RETURN(const Ref value, Pop());
  ASSIGN_OR_RETURN(const Ref key, Pop());
  return Extend(Kind::kDict, {key, value});
}

template <int width>
absl::Status PickleMachine::Put() {
  ASSIGN_OR_RETURN(const uint64_t index, Number(width));
  return PutAt(index);
}

absl::Status PickleMachine::PutAt(uint64_t index) {
  ASSIGN_OR_RETURN(memo_[index], Top());
  if (memo_.size() > kMaxPickleValues) return Refuse(absl::StrCat("a memo of more than ", kMaxPickleValues, " values"));
  return absl::OkStatus();
}

template <int width>
absl::Status PickleMachine::Get() {
  ASSIGN_OR_RETURN(const uint64_t index, Number(width));
  const auto found = memo_.find(index);
  if (found == memo_.end()) return Refuse(absl::StrCat("memo ", index, ", which was never set"));
  return Push(found->second);
}

absl::Status PickleMachine::GlobalOfLines() {
  ASSIGN_OR_RETURN(const absl::string_view module, Line());
  ASSIGN_OR_RETURN(const absl::string_view name, Line());
  return PushGlobal(module, name);
}

absl::Status PickleMachine::GlobalOfStack() {
  ASSIGN_OR_RETURN(const Ref name, Pop());
  ASSIGN_OR_RETURN(const Ref module, Pop());
  if (!Is(name, Kind::kString) || !Is(module, Kind::kString)) return Refuse("a global without a name");
  return PushGlobal(values_[module].text, values_[name].text);
}

const PickleMachine::Opcode PickleMachine::kOpcodes[] = {
    {0x80, &PickleMachine::Protocol},                  // PROTO
    {0x95, &PickleMachine::Frame},                     // FRAME
    {'q', &PickleMachine::Put<1>},                     // BINPUT
    {'r', &PickleMachine::Put<4>},                     // LONG_BINPUT
    {0x94, &PickleMachine::Memoize},                   // MEMOIZE
    {'h', &PickleMachine::Get<1>},                     // BINGET
    {'j', &PickleMachine::Get<4>},                     // LONG_BINGET
    {'(', &PickleMachine::Mark},                       // MARK
    {'t', &PickleMachine::PushTupleToMark},            // TUPLE
    {'e', &PickleMachine::ExtendToMark<Kind::kList>},  // APPENDS
    {'u', &PickleMachine::ExtendToMark<Kind::kDict>},  // SETITEMS
    {'a', &PickleMachine::Append},                     // APPEND
    {'s', &PickleMachine::SetItem},                    // SETITEM
    {'N', &PickleMachine::PushEmpty<Kind::kNone>},     // NONE
    {0x88, &PickleMachine::PushEmpty<Kind::kBool>},    // NEWTRUE
    {0x89, &PickleMachine::PushEmpty<Kind::kBool>},    // NEWFALSE
    {'K', &PickleMachine::PushUnsigned<1>},            // BININT1
    {'M', &PickleMachine::PushUnsigned<2>},            // BININT2
    {'J', &PickleMachine::PushSigned},                 // BININT
    {0x8a, &PickleMachine::PushLong},                  // LONG1
    {'G', &PickleMachine::PushFloat},                  // BINFLOAT
    {0x8c, &PickleMachine::PushString<1>},             // SHORT_BINUNICODE
    {'X', &PickleMachine::PushString<4>},              // BINUNICODE
    {0x8d, &PickleMachine::PushString<8>},             // BINUNICODE8
    {'}', &PickleMachine::PushEmpty<Kind::kDict>},     // EMPTY_DICT
    {']', &PickleMachine::PushEmpty<Kind::kList>},     // EMPTY_LIST
    {')', &PickleMachine::PushTuple<0>},               // EMPTY_TUPLE
    {0x85, &PickleMachine::PushTuple<1>},              // TUPLE1
    {0x86, &PickleMachine::PushTuple<2>},              // TUPLE2
    {0x87, &PickleMachine::PushTuple<3>},              // TUPLE3
    {'c', &PickleMachine::GlobalOfLines},              // GLOBAL
    {0x93, &PickleMachine::GlobalOfStack},             // STACK_GLOBAL
    {'Q', &PickleMachine::PersistentId},               // BINPERSID
    {'R', &PickleMachine::Reduce},                     // REDUCE
    {'b', &PickleMachine::Build},                      // BUILD
};

absl::StatusOr<bool> PickleMachine::Step() {
  opcode_ = at_;
  ASSIGN_OR_RETURN(const uint64_t code, Number(1));
  if (code == kStop) return true;
  const auto* const opcode =
      std::find_if(std::begin(kOpcodes), std::end(kOpcodes), [&](const Opcode& known) { return known.code == code; });
  if (opcode == std::end(kOpcodes)) {
    return Refuse(absl::StrCat("opcode 0x", absl::Hex(code), ", which torch.save does not write for tensors"));
  }
  RETURN_IF_ERROR((this->*opcode->run)());
  return false;
}

absl::StatusOr<int64_t> PickleMachine::Count(Ref ref) const {
  const PickleValue& value = values_[ref];
  if (value.kind != Kind::kInt) return Refuse(absl::StrCat(KindName(ref), " for a count"));
  if (value.number < 0) return Refuse(absl::StrCat("a count of ", value.number));
  return value.number;
}

absl::StatusOr<PickleRef> PickleMachine::Run() {
  for (bool stopped = false; !stopped;) {
    ASSIGN_OR_RETURN(stopped, Step());
  }
  ASSIGN_OR_RETURN(const Ref result, Pop());
  if (!stack_.empty() || !marks_.empty()) return Refuse("ends with values left over");
  return result;
}

}  // namespace dejavu
