// PickleMachine: runs a pickle without executing anything that it names. One pickle, one thread.
//
// A pickle is a program for a stack machine. This machine runs the opcodes that torch.save writes (protocol 2, and
// their successors up to protocol 4), whose results are plain values. Values live in one array and refer to each other
// by index, so that sharing costs nothing, cycles do no harm and nothing recurses. Counts are bounded: every opcode
// makes at most one value, and values, stack, marks and memo have limits.
#ifndef ENGINE_FORMATS_PICKLE_MACHINE_H_
#define ENGINE_FORMATS_PICKLE_MACHINE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/tensor.h"

namespace dejavu {

inline constexpr size_t kMaxPickleNameBytes = 1'000;

enum class PickleCallable { kOrderedDict, kRebuildTensor, kRebuildParameter, kStorageType };

// Everything that a pickle may name.
struct PickleGlobal {
  absl::string_view module;
  absl::string_view name;
  PickleCallable callable;
  std::optional<DType> dtype;
};
using PickleRef = uint32_t;  // index of a value

enum class PickleKind : uint8_t {
  kNone,
  kBool,
  kInt,
  kFloat,
  kString,
  kTuple,
  kList,
  kDict,
  kGlobal,
  kStorage,
  kTensor
};
inline constexpr const char* kPickleKindNames[] = {"None",     "a bool",    "an integer", "a float",
                                                   "a string", "a tuple",   "a list",     "a dictionary",
                                                   "a global", "a storage", "a tensor"};

struct PickleValue {
  PickleKind kind = PickleKind::kNone;
  int64_t number = 0;                  // int; global: index in kGlobals; storage: elements
  absl::string_view text = {};         // string; storage: key. Points into the pickle
  const PickleGlobal* type = nullptr;  // global; storage: its element type
  std::vector<PickleRef> items =
      {};  // tuple, list; dictionary: key, value, key, ...; tensor: storage, offset, shape, strides
};

class PickleMachine {
 public:
  explicit PickleMachine(absl::string_view pickle) : pickle_(pickle) {}

  // Runs the whole program; the one value that it leaves on the stack.
  absl::StatusOr<PickleRef> Run();

  const PickleValue& value(PickleRef ref) const { return values_[ref]; }
  bool Is(PickleRef ref, PickleKind kind) const { return values_[ref].kind == kind; }
  // "an integer".
  const char* KindName(PickleRef ref) const { return kPickleKindNames[static_cast<int>(values_[ref].kind)]; }
  // An integer that is not negative.
  absl::StatusOr<int64_t> Count(PickleRef ref) const;

  // INVALID_ARGUMENT with the place of the opcode that was run last.
  absl::Status Refuse(absl::string_view reason) const;

 private:
  using Ref = PickleRef;
  using Kind = PickleKind;
  struct Opcode {
    uint8_t code;
    absl::Status (PickleMachine::*run)();
  };
  static const Opcode kOpcodes[];

  // One opcode; true at the end of the program.
  absl::StatusOr<bool> Step();

  // The program.
  absl::StatusOr<absl::string_view> Bytes(uint64_t count);
  absl::StatusOr<uint64_t> Number(int width);
  absl::StatusOr<absl::string_view> Line();

  // The stack. A pop never reaches below the innermost mark.
  absl::Status Push(Ref ref);
  absl::Status PushValue(PickleValue value);
  absl::StatusOr<Ref> Pop();
  absl::StatusOr<Ref> Top();
  absl::StatusOr<std::vector<Ref>> PopToMark();
  // Appends to the list or dictionary on top of the stack.
  absl::Status Extend(Kind kind, std::vector<Ref> items);
  absl::Status PushInteger(absl::StatusOr<uint64_t> number, int width);
  absl::Status PushGlobal(absl::string_view module, absl::string_view name);

  // What the opcodes do.
  absl::Status Protocol();
  absl::Status Frame();
  template <Kind kind>
  absl::Status PushEmpty() {
    return PushValue({.kind = kind});
  }
  template <int width>
  absl::Status PushUnsigned() {
    return PushInteger(Number(width), 8);
  }
  absl::Status PushSigned() { return PushInteger(Number(4), 4); }
  absl::Status PushLong();
  absl::Status PushFloat();
  template <int length_width>
  absl::Status PushString();
  template <int count>
  absl::Status PushTuple();
  absl::Status Mark();
  absl::Status PushTupleToMark();
  template <Kind kind>
  absl::Status ExtendToMark();
  absl::Status Append();
  absl::Status SetItem();
  template <int width>
  absl::Status Put();
  absl::Status Memoize() { return PutAt(memo_.size()); }
  absl::Status PutAt(uint64_t index);
  template <int width>
  absl::Status Get();
  absl::Status GlobalOfLines();
  absl::Status GlobalOfStack();
  absl::Status PersistentId();
  absl::Status Reduce();
  absl::Status Build();

  const absl::string_view pickle_;
  size_t at_ = 0;      // next byte of the program
  size_t opcode_ = 0;  // where the current opcode is, for messages
  std::vector<PickleValue> values_;
  std::vector<Ref> stack_;
  std::vector<size_t> marks_;  // stack heights
  absl::flat_hash_map<uint64_t, Ref> memo_;
};

}  // namespace dejavu

#endif  // ENGINE_FORMATS_PICKLE_MACHINE_H_
