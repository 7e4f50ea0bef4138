// `dejavu-bench imbalance`: how evenly the active neurons of decode steps fall on the ranks of a group, by how neurons
// are dealt to them. The model runs whole, once for each batch; which rank would have had a neuron is looked up.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/model/shard.h"
#include "engine/ranks/model_runner.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/flags.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

struct ImbalanceOptions : ModelFlags {
  std::string predictor;  // as ModelOptions has it
  std::string text;       // what is decoded, teacher-forced; empty: random tokens
  std::vector<int> ranks = {2, 4, 8};
  std::vector<int> batches = {1, 4, 16};
  std::vector<std::string> tiers = {"balanced"};
  int steps = 10000;
  int window = 256;  // a sequence begins anew after so many positions
  std::string json;
};

// Of the ranks in one layer.
double Slowest(const std::vector<int64_t>& counts, int ranks, int32_t layer) {
  const auto first = counts.begin() + int64_t{layer} * ranks;
  return static_cast<double>(*std::max_element(first, first + ranks));
}

// One way of dealing neurons to so many ranks, and what came of it.
class Deal {
 public:
  using OwnerOf = std::vector<std::vector<uint8_t>>;  // [layers][neurons]

  Deal(std::string name, int ranks, OwnerOf owner)
      : name_(std::move(name)),
        ranks_(ranks),
        owner_(std::move(owner)),
        step_(owner_.size() * ranks),
        total_(owner_.size() * ranks) {}

  // As MakeShard has it.
  static absl::StatusOr<Deal> AsShards(std::string name, const OptConfig& config, const PredictorData* predictor,
                                       int ranks) {
    OwnerOf owner(config.layers, std::vector<uint8_t>(config.ffn));
    for (int rank = 0; rank < ranks; ++rank) {
      ASSIGN_OR_RETURN(const Shard shard, MakeShard(config, predictor, rank, ranks));
      for (int32_t l = 0; l < config.layers; ++l) {
        for (int32_t i = 0; i < shard.neuron_count; ++i) owner[l][shard.neuron(l, i)] = static_cast<uint8_t>(rank);
      }
    }
    return Deal(std::move(name), ranks, std::move(owner));
  }

  static Deal Slices(const OptConfig& config, int ranks) {
    std::vector<uint8_t> owner(config.ffn);
    for (int rank = 0; rank < ranks; ++rank) {
      const Shard::Range range = Shard::RangeOf(config.ffn, rank, ranks);
      std::fill_n(owner.begin() + range.first, range.count, static_cast<uint8_t>(rank));
    }
    return Deal("contiguous", ranks, OwnerOf(config.layers, owner));
  }

  void Clear() {
    std::fill(step_.begin(), step_.end(), 0);
    std::fill(total_.begin(), total_.end(), 0);
    steps_.clear();
  }
  void Count(int32_t layer, const std::vector<int32_t>& active) {
    int64_t* const counts = &step_[static_cast<size_t>(layer) * ranks_];
    const std::vector<uint8_t>& owner = owner_[layer];
    for (const int32_t neuron : active) ++counts[owner[neuron]];
  }
  void EndStep() {
    steps_.push_back(SumOfSlowest(step_) * ranks_ / SumOf(step_));
    for (size_t i = 0; i < step_.size(); ++i) total_[i] += step_[i];
    std::fill(step_.begin(), step_.end(), 0);
  }

  nlohmann::json Describe() const {
    std::vector<double> sorted = steps_;
    std::sort(sorted.begin(), sorted.end());
    std::vector<int64_t> ranks(ranks_);
    for (size_t i = 0; i < total_.size(); ++i) ranks[i % ranks_] += total_[i];
    double sum = 0.0;
    for (const double step : sorted) sum += step;
    return {{"ranks", ranks_},
            {"dealing", name_},
            {"steps", steps_.size()},
            {"imbalance", Slowest(ranks, ranks_, 0) * ranks_ / SumOf(total_)},
            {"imbalance_by_layer", SumOfSlowest(total_) * ranks_ / SumOf(total_)},
            {"step_mean", sum / static_cast<double>(sorted.size())},
            {"step_p50", Quantile(sorted, 0.50)},
            {"step_p99", Quantile(sorted, 0.99)},
            {"step_most", sorted.back()}};
  }

 private:
  double SumOfSlowest(const std::vector<int64_t>& counts) const {
    double sum = 0.0;
    for (size_t l = 0; l < owner_.size(); ++l) sum += Slowest(counts, ranks_, static_cast<int32_t>(l));
    return sum;
  }
  static double SumOf(const std::vector<int64_t>& counts) {
    double sum = 0.0;
    for (const int64_t count : counts) sum += static_cast<double>(count);
    return std::max(sum, 1.0);
  }

  const std::string name_;
  const int ranks_;
  const OwnerOf owner_;
  std::vector<int64_t> step_, total_;  // [layers, ranks] active neurons, of the running step and of all
  std::vector<double> steps_;          // of each: the slowest rank over the mean, layers added up
};

// The neurons that are not zero in some row. A step leaves what it does not select untouched, so the activations are
// cleared once they have been seen; the first step must select everything.
class ActiveNeurons final : public ModelObserver {
 public:
  ActiveNeurons(const OptConfig& config, std::vector<Deal>& deals)
      : deals_(deals), seen_(config.ffn), found_(config.layers) {}

  void OnMlp(int32_t layer, Tensor activations, Tensor) override {
    std::fill(seen_.begin(), seen_.end(), 0);
    for (int64_t r = 0; r < activations.rows; ++r) {
      float* const row = activations.row<float>(r);
      for (size_t i = 0; i < seen_.size(); ++i) seen_[i] |= row[i] != 0.0f;
      std::fill_n(row, seen_.size(), 0.0f);
    }
    active_.clear();
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (seen_[i]) active_.push_back(static_cast<int32_t>(i));
    }
    found_[layer] = static_cast<int32_t>(active_.size());
    for (Deal& deal : deals_) deal.Count(layer, active_);
  }

  int32_t found(int32_t layer) const { return found_[layer]; }

 private:
  std::vector<Deal>& deals_;
  std::vector<uint8_t> seen_;    // [ffn]
  std::vector<int32_t> active_;  // ids
  std::vector<int32_t> found_;   // [layers]
};

class ImbalanceBench {
 public:
  ImbalanceBench(const ImbalanceOptions& options, ModelRunner& runner, std::vector<int32_t> tokens,
                 std::vector<Deal>& deals, ProgressLine& progress)
      : options_(options),
        runner_(runner),
        tokens_(std::move(tokens)),
        deals_(deals),
        observer_(runner.config(), deals),
        progress_(progress) {
    runner_.model().set_observer(&observer_);
    Step(Tier::kExact, runner_.options().slots, 0);
  }
  ~ImbalanceBench() { runner_.model().set_observer(nullptr); }

  nlohmann::json Run(Tier tier, int batch) {
    for (Deal& deal : deals_) deal.Clear();
    int64_t active = 0;
    for (int step = 0; step < options_.steps && !Interrupted(); ++step) {
      Step(tier, batch, step);
      for (int32_t l = 0; l < runner_.config().layers; ++l) {
        const int32_t counted = runner_.counts().active_of(l, batch);
        CHECK(observer_.found(l) == counted)
            << "layer " << l << ": " << observer_.found(l) << " neurons are not zero, " << counted << " were counted";
        active += counted;
      }
      for (Deal& deal : deals_) deal.EndStep();
      progress_.Show(absl::StrCat(std::string(Name(tier)), ", batch ", batch), (step + 1.0) / options_.steps);
    }
    const OptConfig& config = runner_.config();
    nlohmann::json rows = nlohmann::json::array();
    if (Interrupted()) return rows;
    for (const Deal& deal : deals_) {
      nlohmann::json row = deal.Describe();
      row["model"] = options_.model;
      row["synthetic"] = IsSynthetic(options_.model);
      row["tier"] = std::string(Name(tier));
      row["batch"] = batch;
      row["active_share"] = static_cast<double>(active) / (double(config.layers) * config.ffn * options_.steps);
      rows.push_back(std::move(row));
    }
    return rows;
  }

 private:
  void Step(Tier tier, int batch, int step) {
    SparsityParams sparsity;
    sparsity.tier = tier;
    Batch& rows = runner_.StartBatch();
    const size_t apart = tokens_.size() / batch;
    for (int slot = 0; slot < batch; ++slot) {
      const int32_t token = tokens_[(slot * apart + step) % tokens_.size()];
      rows.AddDecodeRow(slot, step % runner_.options().window, token, /*wants_logits=*/false, sparsity);
    }
    runner_.Run();
  }

  const ImbalanceOptions& options_;
  ModelRunner& runner_;
  const std::vector<int32_t> tokens_;
  std::vector<Deal>& deals_;
  ActiveNeurons observer_;
  ProgressLine& progress_;
};

void Print(const nlohmann::json& rows) {
  std::printf("%-9s %5s %5s %-11s %6s %8s %10s %9s %9s %9s %9s %9s\n", "tier", "batch", "ranks", "dealing", "steps",
              "active", "all steps", "by layer", "step mean", "p50", "p99", "most");
  for (const nlohmann::json& row : rows) {
    const auto number = [&](const char* key) { return row.at(key).get<double>(); };
    std::printf("%-9s %5d %5d %-11s %6d %7.2f%% %10.4f %9.4f %9.4f %9.4f %9.4f %9.4f\n",
                row.at("tier").get<std::string>().c_str(), row.at("batch").get<int>(), row.at("ranks").get<int>(),
                row.at("dealing").get<std::string>().c_str(), row.at("steps").get<int>(), 100 * number("active_share"),
                number("imbalance"), number("imbalance_by_layer"), number("step_mean"), number("step_p50"),
                number("step_p99"), number("step_most"));
  }
}

absl::StatusOr<std::vector<Tier>> TiersOf(const ImbalanceOptions& options, const PredictorData* predictor) {
  std::vector<Tier> tiers;
  for (const std::string& name : options.tiers) {
    tiers.push_back(*ParseTier(name));
    RETURN_IF_ERROR(CheckServes(options.model, predictor, tiers.back()));
  }
  return tiers;
}

absl::StatusOr<std::vector<int32_t>> TokensOf(const ImbalanceOptions& options, int slots) {
  return options.text.empty() ? BenchTokens(options.model, "", int64_t{options.steps} * slots)
                              : ReadTokens(options.model, options.text, 0);
}

absl::StatusOr<std::vector<Deal>> DealsOf(const ImbalanceOptions& options, const OptConfig& config,
                                          const PredictorData* predictor) {
  std::vector<Deal> deals;
  for (const int ranks : options.ranks) {
    if (predictor != nullptr) {
      ASSIGN_OR_RETURN(Deal frequency, Deal::AsShards("frequency", config, predictor, ranks));
      deals.push_back(std::move(frequency));
    }
    ASSIGN_OR_RETURN(Deal in_turn, Deal::AsShards("in turn", config, nullptr, ranks));
    deals.push_back(std::move(in_turn));
    deals.push_back(Deal::Slices(config, ranks));
  }
  return deals;
}

absl::Status Bench(const ImbalanceOptions& options) {
  StopOnInterrupt();
  RETURN_IF_ERROR(CheckWritable(options.json));
  ModelRunner::Options run = RunnerOptions(options);
  run.predictor = options.predictor;
  run.pin = false;
  run.slots = run.max_rows = *std::max_element(options.batches.begin(), options.batches.end());
  run.window = options.window;
  ASSIGN_OR_RETURN(std::vector<int32_t> tokens, TokensOf(options, run.slots));
  ProgressLine progress("dejavu-bench");
  ASSIGN_OR_RETURN(const auto runner, ModelRunner::Create(run, ShowProgress(progress, "loading")));
  ASSIGN_OR_RETURN(const std::vector<Tier> tiers, TiersOf(options, runner->predictor_data()));
  ASSIGN_OR_RETURN(std::vector<Deal> deals, DealsOf(options, runner->config(), runner->predictor_data()));

  nlohmann::json rows = nlohmann::json::array();
  {
    ImbalanceBench bench(options, *runner, std::move(tokens), deals, progress);
    for (const Tier tier : tiers) {
      for (const int batch : options.batches) {
        for (nlohmann::json& row : bench.Run(tier, batch)) rows.push_back(std::move(row));
        if (Interrupted()) return absl::CancelledError("interrupted");
      }
    }
  }

  std::printf("%s, %s; slowest rank over mean, of active neurons\n\n", options.model.c_str(),
              options.text.empty() ? "random tokens" : options.text.c_str());
  if (!runner->synthetic().empty()) std::printf("SYNTHETIC: %s\n\n", runner->synthetic().c_str());
  Print(rows);
  return WriteJson(options.json, {{"rows", std::move(rows)}});
}

}  // namespace

Subcommand AddImbalance(CLI::App& program) {
  const auto options = std::make_shared<ImbalanceOptions>();
  CLI::App* const command =
      program.add_subcommand("imbalance", "How evenly active neurons fall on ranks, by how neurons are dealt to them");
  AddModelName(command, options->model, "synthetic:opt-6.7b");
  AddType(command, options->weights, "Type of the matrices in memory", kTypesInMemory);
  AddPredictor(command, options->predictor);
  command->add_option("--text", options->text, "Text that is decoded; without: random tokens");
  command->add_option("--ranks", options->ranks, "Such as 2,4,8")
      ->delimiter(',')
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  AddBatches(command, options->batches)->capture_default_str();
  AddTiers(command, options->tiers, "Such as exact,balanced")->capture_default_str();
  command->add_option("--steps", options->steps, "Decode steps of each tier and batch")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--window", options->window, "Positions after which a sequence begins anew")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  AddThreads(command, options->threads);
  AddJson(command, options->json);
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
