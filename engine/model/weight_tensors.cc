#include "engine/model/weight_tensors.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

using Layout = LinearWeights::Layout;

class TensorList {
 public:
  TensorList(const OptConfig& config, const Shard& shard) : config_(config), shard_(shard) {}

  static Runs All(int64_t count) { return {{0, static_cast<int32_t>(count)}}; }

  void Vector(std::string name, Tensor* view, int64_t count, Runs own) {
    list_.push_back({std::move(name), view, /*is_vector=*/true, 1, count, std::move(own), nullptr, ""});
  }

  void Matrix(const std::string& name, Tensor* weight, Tensor* scale, int64_t rows, int64_t cols, Runs own) {
    list_.push_back(
        {name + ".weight", weight, /*is_vector=*/false, rows, cols, std::move(own), scale, name + ".scale"});
  }

  void Norm(const std::string& name, NormWeights* norm) {
    Vector(name + ".weight", &norm->weight, config_.hidden, All(config_.hidden));
    Vector(name + ".bias", &norm->bias, config_.hidden, All(config_.hidden));
  }

  // Rows of weight that are inputs are shared out: the first rank adds the bias of all outputs.
  void Linear(const std::string& name, LinearWeights* linear, Layout layout, int64_t rows, const Runs& own) {
    linear->layout = layout;
    Matrix(name, &linear->weight, &linear->scale, rows, config_.hidden, own);
    if (!config_.biases) return;
    const int64_t outputs = layout == Layout::kOutputRows ? rows : config_.hidden;
    Vector(name + ".bias", &linear->bias, outputs,
           layout == Layout::kOutputRows ? own
           : shard_.first()              ? All(outputs)
                                         : Runs());
  }

  void Layer(int32_t l, LayerWeights* layer) {
    const std::string at = absl::StrCat("layers.", l, ".");
    const int32_t hidden = config_.hidden, first = shard_.heads.first * config_.head_dim,
                  features = shard_.heads.count * config_.head_dim;
    const Runs neurons = shard_.NeuronRuns(l);
    Norm(at + "attention_norm", &layer->attention_norm);
    Linear(at + "qkv", &layer->qkv, Layout::kOutputRows, int64_t{3} * hidden,
           {{first, features}, {hidden + first, features}, {2 * hidden + first, features}});
    Linear(at + "out", &layer->out, Layout::kInputRows, hidden, {{first, features}});
    Norm(at + "mlp_norm", &layer->mlp_norm);
    Linear(at + "up", &layer->mlp.up, Layout::kOutputRows, config_.ffn, neurons);
    Linear(at + "down", &layer->mlp.down, Layout::kInputRows, config_.ffn, neurons);
  }

  std::vector<WeightTensor> Take() { return std::move(list_); }

 private:
  const OptConfig& config_;
  const Shard& shard_;
  std::vector<WeightTensor> list_;
};

}  // namespace

std::vector<WeightTensor> TensorsOf(const OptConfig& config, const Shard& shard, bool has_own_head, OptWeights* w) {
  TensorList list(config, shard);
  const auto ends = [&](const char* name, Tensor* weight, Tensor* scale) {
    list.Matrix(name, weight, scale, config.vocab, config.embed, {shard.vocab});
  };
  ends("token_embedding", &w->token_embedding.weight, &w->token_embedding.scale);
  if (has_own_head) ends("head", &w->head.weight, &w->head.scale);
  const int64_t positions = config.context + kPositionOffset;
  list.Matrix("position_embedding", &w->position_embedding, nullptr, positions, config.hidden,
              TensorList::All(positions));
  if (config.embed != config.hidden) {
    list.Matrix("project_in", &w->project_in.weight, &w->project_in.scale, config.hidden, config.embed,
                TensorList::All(config.hidden));
    list.Matrix("project_out", &w->project_out.weight, &w->project_out.scale, config.embed, config.hidden,
                TensorList::All(config.embed));
  }
  w->layers.resize(config.layers);
  for (int32_t l = 0; l < config.layers; ++l) list.Layer(l, &w->layers[l]);
  if (config.final_norm) list.Norm("final_norm", &w->final_norm);
  return list.Take();
}

}  // namespace dejavu
