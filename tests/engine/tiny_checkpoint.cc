#include "tests/engine/tiny_checkpoint.h"

#include <random>
#include <utility>

namespace dejavu {

TinyCheckpoint TinyCheckpoint::Random(uint32_t seed, int hidden, int ffn, int layers, int vocab) {
  TinyCheckpoint checkpoint;
  checkpoint.config = {{"model_type", "opt"},
                       {"hidden_size", hidden},
                       {"num_hidden_layers", layers},
                       {"num_attention_heads", 2},
                       {"ffn_dim", ffn},
                       {"vocab_size", vocab},
                       {"max_position_embeddings", 32},
                       {"word_embed_proj_dim", hidden},
                       {"activation_function", "relu"}};
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-0.3f, 0.3f);
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    int64_t elements = 1;
    for (int64_t d : shape) elements *= d;
    Values values{std::move(shape), std::vector<float>(elements)};
    for (float& x : values.data) x = uniform(random);
    checkpoint.tensors["model.decoder." + name] = std::move(values);
  };
  add("embed_tokens.weight", {vocab, hidden});
  add("embed_positions.weight", {34, hidden});
  for (int l = 0; l < layers; ++l) {
    const std::string at = "layers." + std::to_string(l) + ".";
    for (const char* projection : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
      add(at + "self_attn." + projection + ".weight", {hidden, hidden});
      add(at + "self_attn." + projection + ".bias", {hidden});
    }
    for (const char* norm : {"self_attn_layer_norm", "final_layer_norm"}) {
      add(at + norm + ".weight", {hidden});
      add(at + norm + ".bias", {hidden});
    }
    add(at + "fc1.weight", {ffn, hidden});
    add(at + "fc1.bias", {ffn});
    add(at + "fc2.weight", {hidden, ffn});
    add(at + "fc2.bias", {hidden});
  }
  add("final_layer_norm.weight", {hidden});
  add("final_layer_norm.bias", {hidden});
  return checkpoint;
}

TinyCheckpoint& TinyCheckpoint::Untie(uint32_t seed) {
  Values head = tensors.at("model.decoder.embed_tokens.weight");
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-0.3f, 0.3f);
  for (float& x : head.data) x = uniform(random);
  tensors["lm_head.weight"] = std::move(head);
  config["tie_word_embeddings"] = false;
  return *this;
}

void TinyCheckpoint::Write(const ScratchDirectory& directory) const {
  directory.Write("config.json", config.dump());
  nlohmann::json header;
  std::string data;
  for (const auto& [name, values] : tensors) {
    const size_t begin = data.size();
    data.append(reinterpret_cast<const char*>(values.data.data()), values.data.size() * sizeof(float));
    header[name] = {{"dtype", "F32"}, {"shape", values.shape}, {"data_offsets", {begin, data.size()}}};
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  const std::string prefix(reinterpret_cast<const char*>(&length), sizeof length);
  directory.Write("model.safetensors", prefix + text + data);
}

}  // namespace dejavu
