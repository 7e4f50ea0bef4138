#include <random>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "tests/engine/formats/checkpoint_files.h"

namespace dejavu {
namespace {

using testing::ElementsAre;

// The entries of a valid archive, in this order.
constexpr int kPickleEntry = 0;
constexpr int kStorageEntry = 2;

class TorchArchiveTest : public testing::Test {
 protected:
  absl::StatusOr<TensorMap> ReadBytes(const std::string& bytes) {
    absl::StatusOr<FileTensors> file = ReadTorchArchive(directory_.Write("t.bin", bytes));
    if (!file.ok()) return file.status();
    return file->tensors;
  }
  // With one storage, "0", of the bytes 0, 1, ..., 15.
  static ZipFile Archive(const std::string& pickle, const std::string& order = "little") {
    std::string storage;
    for (char i = 0; i < 16; ++i) storage.push_back(i);
    return ZipFile().Add("t/data.pkl", pickle).Add("t/byteorder", order).Add("t/data/0", storage);
  }
  absl::StatusOr<TensorMap> ReadPickle(const std::string& pickle) { return ReadBytes(Archive(pickle).Bytes()); }
  // One float16 tensor "w" in storage "0".
  static std::string Pickle(int64_t offset, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
    return PickledDict({{"w", PickledTensor(PickledStorage("HalfStorage", "0", 8), offset, shape, strides)}});
  }
  static std::string Valid() { return Pickle(0, {2, 4}, {4, 1}); }

  const ScratchDirectory directory_;
  const std::string path_ = directory_.Path("t.bin");
};

TEST_F(TorchArchiveTest, ReadsTensorsThatShareAStorageAndLeavesOutOtherTypes) {
  const std::string half = PickledStorage("HalfStorage", "0", 8);
  const auto tensors = ReadPickle(PickledDict({
      {"a", PickledTensor(half, 0, {2, 4}, {4, 1})},
      {"tied", PickledTensor(half, 0, {2, 4}, {4, 1})},
      {"part", PickledTensor(half, 5, {1, 3, 1}, {77, 1, 99})},  // a dimension of 1 may have any stride
      {"bits", PickledTensor(PickledStorage("BFloat16Storage", "0", 8), 0, {}, {})},
      {"word", PickledTensor(PickledStorage("FloatStorage", "0", 4), 3, {1}, {1})},
      {"ids", PickledTensor(PickledStorage("LongStorage", "0", 2), 0, {2}, {1})},
  }));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_EQ(tensors->size(), 5);
  EXPECT_THAT(tensors->at("a").shape, ElementsAre(2, 4));
  EXPECT_EQ(tensors->at("tied").offset, tensors->at("a").offset);
  EXPECT_EQ(tensors->at("bits").dtype, DType::kBFloat16);
  EXPECT_EQ(tensors->at("bits").elements, 1);
  uint16_t half_bits = 0;
  ASSERT_TRUE(Checkpoint::Read(tensors->at("part"), 1, 1, &half_bits).ok());
  EXPECT_EQ(half_bits, 0x0d0c);
  uint32_t float_bits = 0;
  ASSERT_TRUE(Checkpoint::Read(tensors->at("word"), 0, 1, &float_bits).ok());
  EXPECT_EQ(float_bits, 0x0f0e0d0c);
}

// model.state_dict() as Transformers saved it: an OrderedDict with state, parameters, integers and names of protocol 4.
TEST_F(TorchArchiveTest, ReadsAnOrderedDictWithMetadataAndParameters) {
  const std::string tensor = PickledTensor(PickledStorage("HalfStorage", "0", 8), 0, {8}, {1});
  const std::string ordered = PickledGlobal("collections", "OrderedDict") + ")R";
  const std::string parameter =
      PickledGlobal("torch._utils", "_rebuild_parameter") + "(" + tensor + "\x88" + ordered + "tR";
  const std::string version = "}" + PickledString("version") + "K\x01s";
  const auto tensors =
      ReadPickle("\x80\x02" + ordered + "q\x05(" + PickledString("w") + parameter + "u" + "}" +
                 PickledString("_metadata") + ordered + "(" + PickledString("layer") + version + "usb.");
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_EQ(tensors->at("w").elements, 8);
  const auto framed = ReadPickle("\x80\x04\x95" + Little(1, 8) + "\x8c\x0b" + "collections" + "\x8c\x0b" +
                                 "OrderedDict" + "\x93\x94)R" + PickledString("w") + tensor + "s.");
  ASSERT_TRUE(framed.ok()) << framed.status();
  EXPECT_EQ(framed->at("w").elements, 8);
}

TEST_F(TorchArchiveTest, ReadsAZip64Archive) {
  const ZipFile archive = Archive(Valid());
  ASSERT_TRUE(ReadBytes(archive.Zip64Bytes()).ok());
  const size_t end64 = archive.end();
  const uint64_t absurd[] = {UINT64_MAX, uint64_t{1} << 63, INT64_MAX, UINT64_MAX - 100, uint64_t{1} << 40};
  for (const uint64_t value : absurd) {
    for (const size_t field : {end64 + 32, end64 + 40, end64 + 48, end64 + 56 + 8}) {  // count, bytes, offset, locator
      SCOPED_TRACE(absl::StrCat(field - end64, " = ", value));
      ExpectRefused(ReadBytes(Patched(archive.Zip64Bytes(), field, value, 8)), {path_, "zip"});
    }
  }
}

TEST_F(TorchArchiveTest, RefusesEntriesWithAbsurdZip64Fields) {
  const ZipFile archive = Archive(Valid());
  for (const size_t field : {20, 24, 42}) {  // compressed bytes, bytes, local header
    const std::string bytes = Patched(archive.Bytes(), archive.central(kStorageEntry) + field, 0xffffffff, 4);
    ExpectRefused(ReadBytes(bytes), {path_, "t/data/0", "zip64"});
  }
  // With a zip64 field that is there: all three values, then the fixed part's count of extra bytes.
  const std::string plain = archive.Bytes();
  const size_t header = archive.central(kStorageEntry);
  const size_t extra_at = header + 46 + std::string("t/data/0").size();
  const auto with_extra = [&](uint64_t size, uint64_t offset) {
    const std::string extra = Little(1, 2) + Little(24, 2) + Little(size, 8) + Little(size, 8) + Little(offset, 8);
    std::string bytes = plain;
    for (const size_t field : {20, 24, 42}) bytes = Patched(bytes, header + field, 0xffffffff, 4);
    bytes = Patched(bytes, header + 30, extra.size(), 2);
    bytes = Patched(bytes, archive.end() + 12, archive.end() - archive.central(0) + extra.size(), 4);
    return bytes.insert(extra_at, extra);
  };
  ASSERT_TRUE(ReadBytes(with_extra(16, archive.local(kStorageEntry))).ok());
  for (const uint64_t absurd : {UINT64_MAX, uint64_t{1} << 63, uint64_t{1} << 40, UINT64_MAX - 29}) {
    ExpectRefused(ReadBytes(with_extra(16, absurd)), {path_, "t/data/0"});
    ExpectRefused(ReadBytes(with_extra(absurd, archive.local(kStorageEntry))), {path_, "t/data/0"});
  }
}

TEST_F(TorchArchiveTest, RefusesAFileCutAnywhere) {
  for (const std::string& valid : {Archive(Valid()).Bytes(), Archive(Valid()).Zip64Bytes()}) {
    for (size_t size = 0; size < valid.size(); ++size) ExpectRefused(ReadBytes(valid.substr(0, size)), {path_});
  }
}

TEST_F(TorchArchiveTest, RefusesCompressedEntries) {
  const ZipFile archive = Archive(Valid());
  for (const int entry : {kPickleEntry, kStorageEntry}) {
    // A bomb: 16 stored bytes that claim to be 4 GB.
    std::string bytes = Patched(archive.Bytes(), archive.central(entry) + 10, 8, 2);
    ExpectRefused(ReadBytes(bytes), {path_, "compressed (method 8)"});
    bytes = Patched(archive.Bytes(), archive.central(entry) + 24, 0xfffffff0, 4);
    ExpectRefused(ReadBytes(bytes), {path_, "stored bytes for 4294967280"});
    bytes = Patched(archive.Bytes(), archive.local(entry) + 8, 8, 2);
    ExpectRefused(ReadBytes(bytes), {path_, "contradicts"});
    bytes = Patched(archive.Bytes(), archive.central(entry) + 8, 1, 2);
    ExpectRefused(ReadBytes(bytes), {path_, "encrypted"});
  }
}

TEST_F(TorchArchiveTest, RefusesEntriesThatOverlapOrLieOutside) {
  const ZipFile archive = Archive(Valid());
  const size_t header = archive.central(kPickleEntry);
  const std::string valid = archive.Bytes();
  const auto resized = [&](uint64_t size) {
    return Patched(Patched(valid, header + 20, size, 4), header + 24, size, 4);
  };
  ExpectRefused(ReadBytes(resized(Valid().size() + 1)), {path_, "overlap"});
  ExpectRefused(ReadBytes(resized(valid.size())), {path_, "t/data.pkl"});
  ExpectRefused(ReadBytes(Patched(valid, header + 42, archive.local(1), 4)), {path_, "contradicts"});
  ExpectRefused(ReadBytes(Patched(valid, header + 42, archive.end(), 4)), {path_, "t/data.pkl"});
  ExpectRefused(ReadBytes(Patched(valid, header + 42, 3, 4)), {path_, "no local header"});
  ExpectRefused(ReadBytes(Patched(valid, archive.local(0) + 28, 0xffff, 2)), {path_, "t/data.pkl"});
  ExpectRefused(ReadBytes(Patched(valid, archive.local(0) + 30, 'x', 1)), {path_, "in its local header"});
  ExpectRefused(ReadBytes(ZipFile(archive).Add("t/data/0", "twice").Bytes()), {path_, "t/data/0", "twice"});
}

TEST_F(TorchArchiveTest, RefusesOtherFormats) {
  ExpectRefused(ReadBytes("\x80\x02\x8a\x0al\xfc\x9c"
                          "F\xf9 j\xa8P\x19."),
                {path_, "before 1.6", "torch.save("});
  ExpectRefused(ReadBytes("GGUF, perhaps"), {path_, "not a PyTorch file"});
  ExpectRefused(ReadBytes(ZipFile().Add("word/document.xml", "<w/>").Bytes()), {path_, "no data.pkl"});
  ExpectRefused(ReadBytes(ZipFile().Add("a/data.pkl", Valid()).Add("b/data.pkl", Valid()).Bytes()), {path_, "two"});
  ExpectRefused(ReadBytes(Archive(Valid(), "big").Bytes()), {path_, "byte order \"big\""});
}

TEST_F(TorchArchiveTest, ExecutesNothingAndNamesWhatAPickleWantedToCall) {
  const std::string marker = directory_.Path("executed");
  const std::string call = "(" + PickledString("touch " + marker) + "tR.";
  const std::pair<const char*, const char*> calls[] = {
      {"os", "system"},           {"posix", "system"},
      {"builtins", "eval"},       {"builtins", "getattr"},
      {"__builtin__", "exec"},    {"subprocess", "Popen"},
      {"torch", "load"},          {"torch._utils", "_rebuild_qtensor"},
      {"collections", "Counter"}, {"torch.FloatStorage", "__reduce__"}};
  for (const auto& [module, name] : calls) {
    SCOPED_TRACE(name);
    const std::string full = absl::StrCat("\"", module, ".", name, "\"");
    ExpectRefused(ReadPickle("\x80\x02" + PickledGlobal(module, name) + call), {path_, full});
    ExpectRefused(ReadPickle("\x80\x04" + PickledString(module) + PickledString(name) + "\x93" + call), {path_, full});
    ExpectRefused(ReadPickle(PickledDict({{"w", PickledGlobal(module, name) + call}})), {path_, full});
  }
  // Protocol 0 (INST, OBJ) and NEWOBJ reach callables in other ways.
  ExpectRefused(ReadPickle("(S'touch x'\nios\nsystem\n."), {path_, "opcode 0x53"});
  ExpectRefused(ReadPickle("(ios\nsystem\n."), {path_, "opcode 0x69"});
  ExpectRefused(ReadPickle(PickledGlobal("collections", "OrderedDict") + ")\x81."), {path_, "opcode 0x81"});
  EXPECT_FALSE(std::filesystem::exists(marker));
}

TEST_F(TorchArchiveTest, BoundsWhatAPickleMayBuild) {
  const std::string deep = std::string(900'000, ']') + std::string(899'999, 'a') + ".";
  ExpectRefused(ReadPickle(deep), {path_, "a list, not a dictionary"});
  ExpectRefused(ReadPickle("\x80\x02" + std::string(2'000'000, '(') + "."), {path_, "nested marks"});
  ExpectRefused(ReadPickle("\x80\x02" + std::string(2'000'000, '}') + "."), {path_, "more than 1000000 values"});
  ExpectRefused(ReadPickle("\x80\x02)" + std::string(900'000, '\x85') + "."), {path_, "a tuple, not a dictionary"});
  std::string fetches = "\x80\x02}q\x01";
  for (int i = 0; i < 1'100'000; ++i) fetches += "h\x01";
  ExpectRefused(ReadPickle(fetches + "."), {path_, "a stack of more than 1000000"});
  std::string memo = "\x80\x02}";
  for (int i = 0; i < 1'100'000; ++i) absl::StrAppend(&memo, "r", Little(static_cast<uint64_t>(i) * 2654435761, 4));
  ExpectRefused(ReadPickle(memo + "."), {path_, "a memo of more than 1000000"});
  ExpectRefused(ReadBytes(Archive(std::string((16 << 20) + 1, '}')).Bytes()), {path_, "a pickle of 16777217 bytes"});
  // A list that contains itself, and a state dictionary that does.
  ExpectRefused(ReadPickle("\x80\x02]q\x01h\x01"
                           "a."),
                {path_, "a list, not a dictionary"});
  ExpectRefused(ReadPickle("\x80\x02}q\x01" + PickledString("self") + "h\x01s."), {path_, "\"self\" is a dictionary"});
}

TEST_F(TorchArchiveTest, RefusesBrokenPickles) {
  const std::string valid = Valid();
  for (size_t size = 0; size < valid.size(); ++size)
    ExpectRefused(ReadPickle(valid.substr(0, size)), {path_, "pickle"});
  for (const char* pickle : {".",
                             "t.",
                             "u.",
                             "}u.",
                             "R.",
                             "NR.",
                             ")R.",
                             "}(Nu.",
                             "}Ns.",
                             "Q.",
                             "NQ.",
                             "b.",
                             "h\x07.",
                             "j\xff\xff\xff\xff.",
                             "}N.",
                             "(}.",
                             "}(s.",
                             "N.",
                             "}}.",
                             "\x93",
                             "NN\x93",
                             "NNb",
                             "Ne.",
                             "\x80\x01}.",
                             "\x8a\x09zzzzzzzzz.",
                             "X\xff\xff\xff\xff",
                             "\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
                             "cno newline",
                             "ctorch\nFloatStorage\n)R.",
                             "}NNs.",
                             "\x80\x09}."}) {
    ExpectRefused(ReadPickle(pickle), {path_, "pickle"});
  }
}

TEST_F(TorchArchiveTest, RefusesAnythingButADictionaryOfTensors) {
  const std::string tensor = PickledTensor(PickledStorage("HalfStorage", "0", 8), 0, {8}, {1});
  ExpectRefused(ReadPickle("\x80\x02" + tensor + "."), {path_, "a tensor, not a dictionary"});
  const std::string inner = "}(" + PickledString("w") + tensor + "u";
  ExpectRefused(ReadPickle(PickledDict({{"state_dict", inner}})), {path_, "\"state_dict\" is a dictionary"});
  ExpectRefused(ReadPickle(PickledDict({{"epoch", "K\x03"}})), {path_, "\"epoch\" is an integer", "state dictionary"});
  const auto beside = ReadPickle(PickledDict({{"w", tensor}, {"epoch", "K\x03"}}));
  ASSERT_TRUE(beside.ok()) << beside.status();
  EXPECT_EQ(beside->size(), 1) << "what is no tensor is passed over";
  ExpectRefused(ReadPickle(PickledDict({{"w", tensor}, {"w", tensor}})), {path_, "\"w\"", "twice"});
  ExpectRefused(ReadPickle("\x80\x02}K\x01" + tensor + "s."), {path_, "not a string"});
}

TEST_F(TorchArchiveTest, RefusesTensorsThatDoNotFitTheirStorage) {
  ASSERT_TRUE(ReadPickle(Valid()).ok());
  const auto refused = [&](int64_t offset, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                           const std::string& reason) {
    ExpectRefused(ReadPickle(Pickle(offset, shape, strides)), {path_, "tensor \"w\"", reason});
  };
  refused(0, {4, 2}, {1, 4}, "not contiguous");  // transposed
  refused(0, {2}, {0}, "not contiguous");        // expanded
  refused(0, {9}, {1}, "9 elements at 0");
  refused(1, {8}, {1}, "8 elements at 1");
  refused(INT64_MAX, {8}, {1}, "elements at");
  refused(9, {0}, {1}, "0 elements at 9");
  refused(-1, {8}, {1}, "a count of -1");
  refused(0, {-8}, {1}, "a count of -8");
  refused(0, {8}, {1, 1}, "different length");
  refused(0, {int64_t{1} << 62, 8}, {8, 1}, "impossible shape");
  refused(0, {int64_t{1} << 32, int64_t{1} << 32}, {int64_t{1} << 32, 1}, "impossible shape");
  refused(0, {1, 1, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1, 1}, "9 dimensions");

  const auto in_storage = [&](const std::string& type, const std::string& key, int64_t elements) {
    return ReadPickle(PickledDict({{"w", PickledTensor(PickledStorage(type, key, elements), 0, {2}, {1})}}));
  };
  ASSERT_TRUE(in_storage("FloatStorage", "0", 4).ok());
  ExpectRefused(in_storage("FloatStorage", "0", 8), {path_, "tensor \"w\"", "16 bytes"});
  ExpectRefused(in_storage("HalfStorage", "0", INT64_MAX), {path_, "tensor \"w\"", "16 bytes"});
  ExpectRefused(in_storage("HalfStorage", "0", -8), {path_, "a count of -8"});
  ExpectRefused(in_storage("HalfStorage", "1", 8), {path_, "tensor \"w\"", "storage \"1\", which is missing"});
  ExpectRefused(in_storage("HalfStorage", "../data.pkl", 8), {path_, "tensor \"w\"", "missing"});
  ExpectRefused(in_storage("FancyStorage", "0", 8), {path_, "torch.FancyStorage"});
}

// A mutated file may still be valid; it must only do no harm.
TEST_F(TorchArchiveTest, SurvivesRandomDamage) {
  const std::string archives[] = {Archive(Valid()).Bytes(), Archive(Valid()).Zip64Bytes()};
  std::mt19937 random(2);
  for (int round = 0; round < 6000; ++round) {
    std::string bytes = archives[round % 2];
    for (uint32_t flips = 1 + random() % 3; flips > 0; --flips) {
      char& byte = bytes[random() % bytes.size()];
      byte = random() % 2 == 0 ? byte ^ 1 << random() % 8 : static_cast<char>(random());
    }
    if (random() % 8 == 0) bytes.erase(random() % bytes.size(), 1 + random() % 8);
    ExpectReadableIfAccepted(ReadBytes(bytes));
  }
}

}  // namespace
}  // namespace dejavu
