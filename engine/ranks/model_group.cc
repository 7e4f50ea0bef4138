#include "engine/ranks/model_group.h"

#include <algorithm>
#include <exception>
#include <future>
#include <limits>
#include <new>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/model/opt_config.h"
#include "engine/ranks/device.h"
#include "kernels/base/exhaustion.h"
#include "kernels/base/status_macros.h"
#include "kernels/draw.h"
#include "kernels/group/agree.h"
#include "kernels/group/thread_group.h"
#include "kernels/mpi/open_mpi.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

// Until all are loaded.
constexpr double kForever = std::numeric_limits<double>::infinity();
const MpiOptions kPatient = {.timeout_s = kForever};

// What every rank says before the group goes on.
struct Hello {
  int32_t version = kStepMessageVersion;
  int32_t kv_blocks = 0;
  int32_t draft_weights = 0;  // 1: made
  int64_t weight_bytes = 0;
  int64_t draft_weight_bytes = 0;
  uint64_t fingerprint = 0;  // of the model
};

uint64_t Fingerprint(const std::string& text) {
  uint64_t hash = 0;
  for (const unsigned char c : text) hash = MixBits(hash + kGoldenRatio + c);
  return hash;
}

// All ranks go on, with the sums and the least of what they said in `hello`, or none.
absl::Status Agree(Communicator& group, const absl::Status& mine, Hello* hello) {
  const Hello first = *hello;  // rank 0's, where it matters
  const auto differs = [](int rank, const char* what) {
    return absl::FailedPreconditionError(absl::StrCat("rank ", rank, " has another ", what, " than rank 0"));
  };
  return Agree(group, mine, hello, [&](int rank, const absl::Status& said, const Hello& of_rank) {
    hello->kv_blocks = std::min(hello->kv_blocks, of_rank.kv_blocks);
    hello->draft_weights = std::min(hello->draft_weights, of_rank.draft_weights);
    if (rank > 0) {
      hello->weight_bytes += of_rank.weight_bytes;
      hello->draft_weight_bytes += of_rank.draft_weight_bytes;
    }
    if (of_rank.version != first.version) return differs(rank, "version of dejavud");
    if (said.ok() && of_rank.fingerprint != first.fingerprint) return differs(rank, "model");
    return said;
  });
}

// Of memory that was refused also what it was for, and the setting that makes it smaller.
absl::Status Named(const absl::Status& status, absl::string_view what, absl::string_view setting) {
  if (!absl::IsResourceExhausted(status)) return status;
  return absl::ResourceExhaustedError(absl::StrCat(what, ": ", status.message(), "; what makes it smaller: ", setting));
}

absl::StatusOr<std::unique_ptr<Backend>> ThreadDevice(const GroupOptions& o, int rank) {
  const int ranks = std::max(1, o.ranks);
  return CreateDevice({.device = o.device,
                       .threads = o.threads,
                       .pin = o.pin,
                       .gpu = rank,
                       .place = rank,
                       .places = ranks,
                       .sharers = ranks});
}

// Where mpirun has bound the processes to CPUs, those are this one's own.
absl::StatusOr<std::unique_ptr<Backend>> MpiDevice(const GroupOptions& o) {
  const MpirunPlace place = GetMpirunPlace();
  return CreateDevice({.device = o.device,
                       .threads = o.threads,
                       .pin = o.pin,
                       .gpu = place.rank,
                       .place = place.bound ? 0 : place.rank,
                       .places = place.bound ? 1 : place.size,
                       .sharers = place.size});
}

Batch BatchOf(const GroupOptions& o) { return {o.max_rows, o.max_logit_rows, o.slots, o.blocks_per_slot}; }

}  // namespace

// A rank's part of everything.
class ModelGroup::Rank {
 public:
  // All ranks come back with OK, or none.
  static absl::StatusOr<std::unique_ptr<Rank>> Create(const GroupOptions& options, const OptConfig& config,
                                                      std::unique_ptr<Communicator> group,
                                                      absl::StatusOr<std::unique_ptr<Backend>> backend,
                                                      const LoadProgress& progress);

  absl::Status Follow();
  absl::Status MakeModel(const PredictorData* data);

  const GroupOptions options_;
  const OptConfig config_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> communicator_;
  LoadedModel loaded_;
  KvCache kv_;
  std::unique_ptr<Predictor> predictor_;
  std::unique_ptr<OptModel> model_;
  std::unique_ptr<StepChannel> channel_;
  Hello hello_;                   // the group's
  std::vector<int32_t> answers_;  // to a ping

 private:
  Rank(const GroupOptions& options, const OptConfig& config) : options_(options), config_(config) {}

  absl::Status Join(std::unique_ptr<Communicator> group, absl::StatusOr<std::unique_ptr<Backend>> backend);
  absl::Status Plan();
  absl::Status Load(const LoadProgress& progress);
};

absl::StatusOr<std::unique_ptr<ModelGroup::Rank>> ModelGroup::Rank::Create(
    const GroupOptions& options, const OptConfig& config, std::unique_ptr<Communicator> group,
    absl::StatusOr<std::unique_ptr<Backend>> backend, const LoadProgress& progress) {
  std::unique_ptr<Rank> rank(new Rank(options, config));
  try {
    RETURN_IF_ERROR(rank->Join(std::move(group), std::move(backend)));
    RETURN_IF_ERROR(Agree(*rank->communicator_, rank->Plan(), &rank->hello_));
    RETURN_IF_ERROR(Agree(*rank->communicator_, rank->Load(progress), &rank->hello_));
  } catch (const std::bad_alloc&) {
    return MemoryRanOut();
  } catch (const std::exception& error) {
    return absl::UnavailableError(error.what());
  }
  rank->answers_.resize(rank->communicator_->size());
  // While rank 0 waits for one that is lost, the others wait for rank 0. It must be the first to give up, for it alone
  // can name the one.
  const double patience = rank->communicator_->rank() == 0 ? 1.0 : 1.25;
  if (options.timeout_s > 0.0) rank->communicator_->SetLimit(patience * options.timeout_s);
  return rank;
}

// The group's own way of adding up comes last: it may need all ranks to be there.
absl::Status ModelGroup::Rank::Join(std::unique_ptr<Communicator> group,
                                    absl::StatusOr<std::unique_ptr<Backend>> backend) {
  RETURN_IF_ERROR(Agree(*group, backend.status(), &hello_));
  backend_ = *std::move(backend);
  absl::StatusOr<std::unique_ptr<Communicator>> joined = backend_->JoinGroup(std::move(group));
  if (!joined.ok()) return joined.status();
  communicator_ = *std::move(joined);
  return absl::OkStatus();
}

absl::Status ModelGroup::Rank::Plan() {
  ASSIGN_OR_RETURN(const GroupOptions::Room room,
                   options_.plan_memory(*backend_, communicator_->rank(), communicator_->size()));
  hello_.kv_blocks = room.kv_blocks;
  hello_.draft_weights = room.draft_weights ? 1 : 0;
  return absl::OkStatus();
}

absl::Status ModelGroup::Rank::Load(const LoadProgress& progress) {
  ModelOptions model = options_.model;
  model.rank = communicator_->rank();
  model.ranks = communicator_->size();
  model.draft_weights = hello_.draft_weights != 0;
  absl::StatusOr<LoadedModel> loaded = OrExhausted([&] { return LoadModel(model, config_, *backend_, progress); });
  const std::string drafts = model.draft_weights ? ", speculation.draft_weights (stored)" : "";
  if (!loaded.ok()) {
    return Named(loaded.status(), "weights and predictor", absl::StrCat("weights (int8), predictor (none)", drafts));
  }
  loaded_ = *std::move(loaded);
  absl::StatusOr<KvCache> kv = KvCache::Create(*backend_, config_, hello_.kv_blocks, options_.block_tokens,
                                               options_.kv_dtype, loaded_.shard.heads.count);
  if (!kv.ok()) {
    return Named(kv.status(), "keys and values", absl::StrCat("kv.memory_mib, scheduler.max_batch", drafts));
  }
  kv_ = *std::move(kv);
  channel_ = std::make_unique<StepChannel>(*communicator_, BatchOf(options_), config_.layers, config_.context,
                                           hello_.kv_blocks);
  hello_.fingerprint = Fingerprint(absl::StrCat(loaded_.weights_hash, " ", Name(loaded_.weights.dtype())));
  hello_.weight_bytes = loaded_.weights.bytes();
  hello_.draft_weight_bytes = loaded_.drafts == nullptr ? 0 : loaded_.drafts->bytes();
  const PredictorData* const predictor = loaded_.predictor.has_value() ? &*loaded_.predictor : nullptr;
  return Named(OrExhausted([&] { return MakeModel(predictor); }), "predictor and activations of a step",
               "scheduler.max_step_tokens, scheduler.max_batch");
}

absl::Status ModelGroup::Rank::MakeModel(const PredictorData* data) {
  model_.reset();
  predictor_.reset();
  ASSIGN_OR_RETURN(predictor_,
                   Predictor::Create(data, config_, loaded_.shard, *backend_, options_.max_rows, options_.max_audits));
  ASSIGN_OR_RETURN(model_,
                   OptModel::Create(config_, loaded_.shard, loaded_.weights, *backend_, *communicator_, *predictor_,
                                    BatchOf(options_), options_.candidates > 0 ? options_.candidates : config_.vocab,
                                    loaded_.drafts.get()));
  return absl::OkStatus();
}

absl::Status ModelGroup::Rank::Follow() {
  Batch batch = BatchOf(options_);
  StepCounts counts = predictor_->MakeCounts();
  try {
    while (true) {
      ASSIGN_OR_RETURN(const StepChannel::Received received, channel_->Receive(&batch, predictor_.get()));
      if (received.kind == StepKind::kStop) return absl::OkStatus();
      if (received.kind == StepKind::kPing) {
        const int32_t here = 1;
        communicator_->Gather(nullptr, &here, sizeof here);
        continue;
      }
      model_->Forward(batch, kv_, {.counts = received.wants_counts ? &counts : nullptr});
    }
  } catch (const std::exception& error) {
    return absl::AbortedError(error.what());
  }
}

// The ranks of this process but rank 0.
class ModelGroup::Threads {
 public:
  // Each makes its backend, loads and follows, in a thread of its own.
  Threads(const GroupOptions& options, const OptConfig& config, std::vector<std::unique_ptr<Communicator>> ranks) {
    for (auto& communicator : ranks) {
      threads_.emplace_back([options, config, group = std::move(communicator)]() mutable {
        const int rank = group->rank();
        GroupOptions own = options;
        own.wrap_backend = nullptr;
        auto made = Rank::Create(own, config, std::move(group), ThreadDevice(options, rank), nullptr);
        if (!made.ok()) return;  // rank 0 knows, and says so
        const absl::Status status = (*made)->Follow();
        if (!status.ok()) spdlog::critical("rank {}: {}", rank, std::string(status.message()));
      });
    }
  }

 private:
  std::vector<std::jthread> threads_;
};

absl::StatusOr<int> GroupSize(int ranks) {
  if (ranks < 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor_parallel is ", ranks, "; it must be at least 0"));
  }
  const int processes = UnderMpirun() ? MpirunSize() : 1;
  if (ranks > 1 && processes > 1 && ranks != processes) {
    return absl::InvalidArgumentError(absl::StrCat("tensor_parallel is ", ranks, " but mpirun started ", processes,
                                                   " processes; each of them is a rank"));
  }
  return ranks == 0 ? processes : ranks;
}

absl::StatusOr<std::unique_ptr<ModelGroup>> ModelGroup::Create(const GroupOptions& options, const OptConfig& config,
                                                               const LoadProgress& progress) {
  ASSIGN_OR_RETURN(const int size, GroupSize(options.ranks));
  std::unique_ptr<ModelGroup> group(new ModelGroup(options));
  std::unique_ptr<Communicator> communicator;
  absl::StatusOr<std::unique_ptr<Backend>> backend = absl::UnknownError("not made");
  if (size > 1 && MpirunSize() > 1) {
    ASSIGN_OR_RETURN(communicator, JoinMpiGroup(kPatient));
    backend = MpiDevice(options);
  } else if (size > 1) {
    auto ranks = MakeThreadGroup(size, {.timeout_s = kForever});
    communicator = std::move(ranks[0]);
    ranks.erase(ranks.begin());
    group->threads_ = std::make_unique<Threads>(options, config, std::move(ranks));
    backend = ThreadDevice(options, 0);
  } else {
    communicator = SingleRank();
    backend = ThreadDevice(options, 0);
  }
  if (backend.ok() && options.wrap_backend) backend = options.wrap_backend(*std::move(backend));
  ASSIGN_OR_RETURN(group->rank_, Rank::Create(options, config, std::move(communicator), std::move(backend), progress));
  group->kv_blocks_ = group->rank_->hello_.kv_blocks;
  group->weight_bytes_ = group->rank_->hello_.weight_bytes;
  group->draft_weight_bytes_ = group->rank_->hello_.draft_weight_bytes;
  return group;
}

absl::Status ModelGroup::Follow(const GroupOptions& options, const OptConfig& config,
                                absl::FunctionRef<void()> on_loaded) {
  ASSIGN_OR_RETURN(std::unique_ptr<Communicator> communicator, JoinMpiGroup(kPatient));
  ASSIGN_OR_RETURN(const std::unique_ptr<Rank> rank,
                   Rank::Create(options, config, std::move(communicator), MpiDevice(options), nullptr));
  on_loaded();
  return rank->Follow();
}

ModelGroup::ModelGroup(const GroupOptions& options) : options_(options) {}

ModelGroup::~ModelGroup() {
  if (rank_ == nullptr || ranks() == 1 || failed_) return;
  try {
    rank_->channel_->Send(StepKind::kStop);
  } catch (const std::exception& error) {
    spdlog::warn("the other ranks could not be told to stop: {}", error.what());
  }
}

template <typename Call>
auto ModelGroup::Guard(const Call& call) {
  try {
    return call();
  } catch (...) {
    failed_ = true;
    throw;
  }
}

uint64_t ModelGroup::Launch(const Batch& batch, const StepOutputs& out) {
  return Guard([&] {
    if (ranks() > 1) rank_->channel_->SendStep(batch, *rank_->predictor_, out.counts != nullptr);
    return rank_->model_->Launch(batch, rank_->kv_, out);
  });
}

void ModelGroup::Await(uint64_t mark, const Batch& batch, const StepOutputs& out) {
  Guard([&] { rank_->model_->Await(mark, batch, out); });
}

void ModelGroup::Ping() {
  if (ranks() == 1) return;
  Guard([&] {
    rank_->channel_->Send(StepKind::kPing);
    const int32_t here = 1;
    rank_->communicator_->Gather(rank_->answers_.data(), &here, sizeof here);
  });
}

absl::Status ModelGroup::SetPredictor(const PredictorData* data) {
  CHECK(ranks() == 1) << "the other ranks have the predictor that was loaded";
  return rank_->MakeModel(data);
}

// A device that other ranks add to must have been told of them before it runs on.
bool ModelGroup::RunsAhead() const { return ranks() == 1 && rank_->backend_->RunsAhead(); }

void ModelGroup::DropPredictorData() { rank_->loaded_.predictor.reset(); }

std::string ModelGroup::Description() const {
  const std::string of_rank = rank_->backend_->Description();
  return ranks() == 1 ? of_rank
                      : absl::StrCat(ranks(), MpirunSize() > 1 ? " processes, each " : " ranks, each ", of_rank);
}

int ModelGroup::ranks() const { return rank_->communicator_->size(); }
CommunicatorStats ModelGroup::communication() const { return rank_->communicator_->stats(); }
Backend& ModelGroup::backend() { return *rank_->backend_; }
Predictor& ModelGroup::predictor() { return *rank_->predictor_; }
OptModel& ModelGroup::model() { return *rank_->model_; }
const LoadedModel& ModelGroup::loaded() const { return rank_->loaded_; }

}  // namespace dejavu
