#include "engine/ranks/step_message.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int32_t kMark = 0x564a4400 + kStepMessageVersion;  // "\x03DJV" in the first four bytes
constexpr size_t kHeader = 3;                                // mark, kind, words after the header
constexpr size_t kFirst = 1024;                              // words that travel at once; the rest follows, if any

enum Flags { kDraws = 1, kWantsCounts = 2, kHasTable = 4, kDrafts = 8 };

// Reads words one after the other; what is beyond the end or out of range is an error, and everything after it.
class Reader {
 public:
  Reader(const int32_t* words, size_t count) : at_(words), end_(words + count) {}

  int32_t Word(const char* what, int64_t least, int64_t most) {
    if (!status_.ok()) return static_cast<int32_t>(least);
    if (at_ == end_) {
      status_ = absl::InvalidArgumentError(absl::StrCat("a step message ends before its ", what));
    } else if (*at_ < least || *at_ > most) {
      status_ = absl::InvalidArgumentError(
          absl::StrCat(what, " of a step message is ", *at_, "; it must be in ", least, " ... ", most));
    } else {
      return *at_++;
    }
    return static_cast<int32_t>(least);
  }
  template <typename T>
  void Words(const char* what, int64_t count, int64_t least, int64_t most, std::vector<T>* to) {
    to->clear();
    for (int64_t i = 0; i < count && status_.ok(); ++i) to->push_back(static_cast<T>(Word(what, least, most)));
  }
  absl::Status Finish() const {
    if (!status_.ok() || at_ == end_) return status_;
    return absl::InvalidArgumentError(absl::StrCat("a step message has ", end_ - at_, " words too many"));
  }

 private:
  const int32_t* at_;
  const int32_t* const end_;
  absl::Status status_;
};

}  // namespace

StepChannel::StepChannel(Communicator& communicator, const Batch& largest, int32_t layers, int32_t context,
                         int32_t kv_blocks)
    : comm_(communicator), layers_(layers), context_(context), kv_blocks_(kv_blocks), switches_(layers) {
  const size_t rows = largest.max_rows, logits = largest.max_logit_rows;
  const size_t most = kHeader + 5 + 6 * rows + logits * (1 + kDrawFields) + layers + largest.block_table.size();
  words_.resize(std::max(most, kFirst));
  if (communicator.rank() == 0) sent_table_.assign(largest.block_table.size(), -1);
}

void StepChannel::SendStep(const Batch& batch, const Predictor& predictor, bool wants_counts) {
  const bool table = batch.block_table != sent_table_;
  used_ = kHeader;
  const auto put = [&](const auto& values) {
    for (const auto& value : values) words_[used_++] = static_cast<int32_t>(value);
  };
  const auto size_of = [](const auto& values) { return static_cast<int32_t>(values.size()); };
  put(std::initializer_list<int32_t>{batch.rows(), batch.decode_rows, size_of(batch.logit_rows),
                                     size_of(batch.audit_rows),
                                     (batch.draws.empty() ? 0 : kDraws) | (wants_counts ? kWantsCounts : 0) |
                                         (table ? kHasTable : 0) | (batch.drafts ? kDrafts : 0)});
  put(batch.tokens);
  put(batch.positions);
  put(batch.row_slots);
  put(batch.tiers);
  put(batch.strict);
  put(batch.logit_rows);
  put(batch.audit_rows);
  for (const auto& draw : batch.draws) put(draw);
  predictor.GetSwitches(&switches_);
  put(switches_);
  if (table) {
    put(batch.block_table);
    sent_table_ = batch.block_table;
  }
  Broadcast(StepKind::kStep);
}

void StepChannel::Send(StepKind kind) {
  used_ = kHeader;
  Broadcast(kind);
}

void StepChannel::Broadcast(StepKind kind) {
  words_[0] = kMark;
  words_[1] = static_cast<int32_t>(kind);
  words_[2] = static_cast<int32_t>(used_ - kHeader);
  comm_.Broadcast(words_.data(), kFirst * sizeof(int32_t));
  if (used_ > kFirst) comm_.Broadcast(words_.data() + kFirst, static_cast<int64_t>((used_ - kFirst) * sizeof(int32_t)));
}

absl::StatusOr<StepChannel::Received> StepChannel::Receive(Batch* batch, Predictor* predictor) {
  comm_.Broadcast(words_.data(), kFirst * sizeof(int32_t));
  if (words_[0] != kMark) {
    return absl::InvalidArgumentError(absl::StrCat("a step message begins with ", words_[0], " and not with ", kMark,
                                                   ", which is version ", kStepMessageVersion));
  }
  Reader header(words_.data() + 1, kHeader - 1);
  Received received;
  received.kind = static_cast<StepKind>(header.Word("kind", 0, static_cast<int32_t>(StepKind::kStop)));
  used_ = kHeader + header.Word("size", 0, static_cast<int64_t>(words_.size() - kHeader));
  RETURN_IF_ERROR(header.Finish());
  if (used_ > kFirst) comm_.Broadcast(words_.data() + kFirst, static_cast<int64_t>((used_ - kFirst) * sizeof(int32_t)));
  if (received.kind == StepKind::kStep) RETURN_IF_ERROR(Read(batch, predictor, &received.wants_counts));
  return received;
}

absl::Status StepChannel::Read(Batch* batch, Predictor* predictor, bool* wants_counts) {
  Reader reader(words_.data() + kHeader, used_ - kHeader);
  const int32_t rows = reader.Word("rows", 1, batch->max_rows);
  const int32_t decode_rows = reader.Word("decode rows", 0, rows);
  const int32_t logit_rows = reader.Word("logit rows", 0, std::min(rows, batch->max_logit_rows));
  const int32_t audit_rows = reader.Word("audit rows", 0, std::min(decode_rows, predictor->max_audits()));
  const int32_t flags = reader.Word("flags", 0, kDraws | kWantsCounts | kHasTable | kDrafts);
  batch->Clear();
  batch->drafts = (flags & kDrafts) != 0;
  batch->decode_rows = decode_rows;
  reader.Words("tokens", rows, 0, INT32_MAX, &batch->tokens);  // none is drawn by the step before: RunsAhead
  reader.Words("positions", rows, 0, context_ - 1, &batch->positions);
  reader.Words("slots", rows, 0, batch->slots - 1, &batch->row_slots);
  reader.Words("tiers", rows, 0, static_cast<int64_t>(kAllTiers.size()) - 1, &batch->tiers);
  reader.Words("strict", rows, 0, 1, &batch->strict);
  reader.Words("logit rows", logit_rows, 0, rows - 1, &batch->logit_rows);
  reader.Words("audit rows", audit_rows, 0, rows - 1, &batch->audit_rows);
  if ((flags & kDraws) != 0) {
    batch->draws.resize(logit_rows);
    for (auto& draw : batch->draws) {
      for (int32_t& field : draw) field = reader.Word("draws", INT32_MIN, INT32_MAX);
    }
  }
  reader.Words("switches", layers_, INT32_MIN, INT32_MAX, &switches_);
  if ((flags & kHasTable) != 0) {
    const auto entries = static_cast<int64_t>(batch->block_table.size());
    reader.Words("block table", entries, 0, kv_blocks_ - 1, &batch->block_table);
    batch->block_table.resize(entries);
  }
  predictor->SetSwitches(switches_);
  *wants_counts = (flags & kWantsCounts) != 0;
  return reader.Finish();
}

}  // namespace dejavu
