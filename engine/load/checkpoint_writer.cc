// The model is generated in memory in our layout and then streamed, tensor by tensor, back into that of Hugging Face.
#include "engine/load/checkpoint_writer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "engine/formats/safetensors_writer.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/model/predictor_file.h"
#include "engine/model/weight_convert.h"
#include "engine/model/weights_hash.h"
#include "kernels/backend.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

// A tensor of the file.
struct Entry {
  std::string name;
  Tensor view;  // [rows, cols] on the device
  bool transposed = false;
  bool vector = false;

  std::vector<int64_t> shape() const {
    if (vector) return {view.cols};
    return transposed ? std::vector<int64_t>{view.cols, view.rows} : std::vector<int64_t>{view.rows, view.cols};
  }
};

void AddNorm(const std::string& name, const NormWeights& norm, std::vector<Entry>* entries) {
  entries->push_back({name + ".weight", norm.weight, false, true});
  entries->push_back({name + ".bias", norm.bias, false, true});
}

void AddLinear(const std::string& name, const LinearWeights& linear, std::vector<Entry>* entries) {
  entries->push_back({name + ".weight", linear.weight, linear.layout == LinearWeights::Layout::kInputRows, false});
  entries->push_back({name + ".bias", linear.bias, false, true});
}

std::vector<Entry> EntriesOf(const OptWeights& w, const OptConfig& config) {
  const std::string decoder = "model.decoder.";
  std::vector<Entry> entries = {{decoder + "embed_tokens.weight", w.token_embedding.weight},
                                {decoder + "embed_positions.weight", w.position_embedding}};
  for (int32_t l = 0; l < config.layers; ++l) {
    const LayerWeights& layer = w.layers[l];
    const std::string at = absl::StrCat(decoder, "layers.", l, ".");
    AddNorm(at + "self_attn_layer_norm", layer.attention_norm, &entries);
    const char* const projections[] = {"q_proj", "k_proj", "v_proj"};
    for (int i = 0; i < 3; ++i) {
      LinearWeights part = layer.qkv;
      part.weight = layer.qkv.weight.Rows(int64_t{i} * config.hidden, config.hidden);
      part.bias = layer.qkv.bias.Cols(int64_t{i} * config.hidden, config.hidden);
      AddLinear(absl::StrCat(at, "self_attn.", projections[i]), part, &entries);
    }
    AddLinear(at + "self_attn.out_proj", layer.out, &entries);
    AddNorm(at + "final_layer_norm", layer.mlp_norm, &entries);
    AddLinear(at + "fc1", layer.mlp.up, &entries);
    AddLinear(at + "fc2", layer.mlp.down, &entries);
  }
  AddNorm(decoder + "final_layer_norm", w.final_norm, &entries);
  return entries;
}

// What comes before the tensors (engine/formats/safetensors.cc tells the format).
std::string HeaderOf(const std::vector<Entry>& entries) {
  Json header = {{"__metadata__", {{"format", "pt"}}}};  // Transformers insists on it
  int64_t offset = 0;
  for (const Entry& entry : entries) {
    header[entry.name] = {{"dtype", SafetensorsName(entry.view.dtype)},
                          {"shape", entry.shape()},
                          {"data_offsets", {offset, offset + entry.view.bytes()}}};
    offset += entry.view.bytes();
  }
  return SafetensorsHeader(header.dump());
}

// Calls write(data, bytes) with the tensor as the file holds it, stripe by stripe.
template <typename Write>
void Stream(const Entry& entry, Backend& backend, const Write& write) {
  const Tensor& view = entry.view;
  const int64_t element = SizeOf(view.dtype), rows = entry.transposed ? view.cols : view.rows;
  const int64_t row_bytes = view.bytes() / rows, stripe_rows = std::clamp<int64_t>(kStripeBytes / row_bytes, 1, rows);
  std::vector<char> stripe(stripe_rows * row_bytes), transposed(entry.transposed ? stripe.size() : 0);
  for (int64_t r = 0; r < rows; r += stripe_rows) {
    const int64_t n = std::min(stripe_rows, rows - r);
    backend.Download(stripe.data(), entry.transposed ? view.Cols(r, n) : view.Rows(r, n));
    backend.Synchronize();
    if (entry.transposed) TransposeValues(stripe.data(), element, view.rows, n, transposed.data());
    write(entry.transposed ? transposed.data() : stripe.data(), n * row_bytes);
  }
}

// Calls fill(file) for a file beside `path` and gives it that name afterwards.
template <typename Fill>
absl::Status WriteFile(const std::string& path, const Fill& fill) {
  const std::string aside = absl::StrCat(path, ".", getpid(), ".tmp");
  std::ofstream file(aside, std::ios::binary);
  fill(file);
  file.close();
  if (file && std::rename(aside.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const std::string reason = std::strerror(errno);
  std::remove(aside.c_str());
  return absl::UnavailableError(absl::StrCat(path, ": cannot be written: ", reason));
}

// The fields of Transformers' OPTConfig.
std::string ConfigText(const OptConfig& config, DType dtype, const std::string& synthetic) {
  const Json json = {{"model_type", "opt"},
                     {"architectures", {"OPTForCausalLM"}},
                     {"synthetic", synthetic},
                     {"torch_dtype", Name(dtype)},
                     {"activation_function", "relu"},
                     {"hidden_size", config.hidden},
                     {"num_hidden_layers", config.layers},
                     {"num_attention_heads", config.heads},
                     {"ffn_dim", config.ffn},
                     {"vocab_size", config.vocab},
                     {"max_position_embeddings", config.context},
                     {"word_embed_proj_dim", config.embed},
                     {"do_layer_norm_before", config.pre_norm},
                     {"_remove_final_layer_norm", !config.final_norm},
                     {"enable_bias", config.biases},
                     {"layer_norm_elementwise_affine", config.affine_norms},
                     {"tie_word_embeddings", true},
                     {"attention_dropout", 0.0},
                     {"dropout", 0.0},
                     {"layerdrop", 0.0},
                     {"init_std", 0.02},
                     {"use_cache", true},
                     {"pad_token_id", 1},
                     {"bos_token_id", *config.bos_token},
                     {"eos_token_id", config.eos_tokens[0]}};
  return json.dump(2) + "\n";
}

}  // namespace

absl::Status WriteCheckpoint(const std::string& synthetic_name, const std::string& weights,
                             const std::string& directory, const LoadProgress& progress) {
  if (!IsSynthetic(synthetic_name)) {
    return absl::InvalidArgumentError(absl::StrCat(synthetic_name, " is no synthetic model"));
  }
  if (weights == "int8") {
    return absl::InvalidArgumentError("a checkpoint cannot hold int8 weights; it can hold fp32, fp16 or bf16");
  }
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(synthetic_name));
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return absl::UnavailableError(absl::StrCat(directory, ": cannot be made: ", error.message()));
  ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, CreateCpuBackend({1, /*pin=*/false}));
  ASSIGN_OR_RETURN(LoadedModel model, LoadModel({synthetic_name, weights, ""}, config, *backend, progress));

  const std::vector<Entry> entries = EntriesOf(model.weights, config);
  RETURN_IF_ERROR(WriteFile(directory + "/config.json", [&](std::ofstream& file) {
    file << ConfigText(config, model.weights.dtype(), model.synthetic);
  }));
  RETURN_IF_ERROR(WriteFile(directory + "/model.safetensors", [&](std::ofstream& file) {
    file << HeaderOf(entries);
    for (const Entry& entry : entries) {
      Stream(entry, *backend, [&](const char* data, int64_t bytes) { file.write(data, bytes); });
    }
  }));
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  ASSIGN_OR_RETURN(model.predictor->weights_hash, WeightsHash(checkpoint, config));
  return WritePredictor(*model.predictor, config, directory + "/predictor.safetensors");
}

}  // namespace dejavu
