#include "loadtest/cli/commands.h"

#include <cmath>
#include <cstdio>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "loadtest/cli/output.h"
#include "loadtest/cli/prompt.h"
#include "loadtest/client/names.h"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

std::string Joined(const google::protobuf::RepeatedField<uint32_t>& ids) {
  std::string text;
  for (const uint32_t id : ids) text += (text.empty() ? "" : ",") + std::to_string(id);
  return text;
}

class ScoreCommand : public Command {
 public:
  explicit ScoreCommand(CLI::App* program)
      : Command(program->add_subcommand("score", "Log-probabilities of the tokens of a prompt")) {
    AddPromptFlags(app_, &prompt_, true);
    AddLinesFlag(app_, &prompt_);
    app_->add_option("--top-logprobs", top_, "Most likely tokens after each one");
    app_->add_option("--model", model_, "Name of the model");
    AddJsonFlag();
  }

  absl::Status Prepare() override {
    const absl::Status model = CheckUtf8("--model", model_);
    return model.ok() ? ReadPrompt(&prompt_) : model;
  }

  int Run(Connection* connection) override {
    v1::ScoreRequest request;
    request.set_model(model_);
    SetPrompt(prompt_, &request);
    if (!prompt_.lines.empty()) request.clear_prompt();
    for (const std::string& line : prompt_.lines) request.add_prompts()->set_text(line);
    request.set_top_logprobs(top_);
    v1::ScoreResponse response;
    const grpc::Status status = connection->Call(
        [&](Attempt* attempt) { return connection->generation().Score(&attempt->context, request, &response); });
    if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
    if (json_) {
      PrintJson(ResponseJson(response));
    } else {
      if (response.scores().empty()) PrintTable(response.tokens());
      for (const v1::PromptScore& score : response.scores()) PrintTable(score.tokens());
    }
    return kExitOk;
  }

 private:
  static Json ResponseJson(const v1::ScoreResponse& response) {
    Json scores = Json::array();
    for (const v1::PromptScore& score : response.scores()) {
      scores.push_back({{"tokens", ToJson(score.tokens())}, {"server_timings", ToJson(score.timings())}});
    }
    if (!scores.empty()) {
      return {{"request_id", response.request_id()}, {"model", response.model()}, {"scores", std::move(scores)}};
    }
    return {{"request_id", response.request_id()},
            {"model", response.model()},
            {"tokens", ToJson(response.tokens())},
            {"server_timings", ToJson(response.timings())}};
  }

  static void PrintTable(const google::protobuf::RepeatedPtrField<v1::ScoredToken>& tokens) {
    double sum = 0;
    int scored = 0;
    std::printf("%8s %14s %8s\n", "id", "logprob", "rank");
    for (const v1::ScoredToken& token : tokens) {
      if (token.has_logprob()) {
        std::printf("%8u %14.9g %8u\n", token.id(), token.logprob(), token.rank());
        sum += token.logprob();
        ++scored;
      } else {
        std::printf("%8u %14s %8s\n", token.id(), "-", "-");
      }
    }
    if (scored > 0)
      std::printf("mean %.9g, perplexity %.6g over %d tokens\n", sum / scored, std::exp(-sum / scored), scored);
  }

  PromptSource prompt_;
  std::string model_;
  uint32_t top_ = 0;
};

class TokenizeCommand : public Command {
 public:
  explicit TokenizeCommand(CLI::App* program)
      : Command(program->add_subcommand("tokenize", "Token ids of a text, as of a prompt")) {
    AddPromptFlags(app_, &prompt_, false);
    AddJsonFlag();
  }

  absl::Status Prepare() override { return ReadPrompt(&prompt_); }

  int Run(Connection* connection) override {
    v1::TokenizeRequest request;
    request.set_text(prompt_.text);
    request.set_parse_special_tokens(prompt_.parse_special);
    v1::TokenizeResponse response;
    const grpc::Status status = connection->Call(
        [&](Attempt* attempt) { return connection->generation().Tokenize(&attempt->context, request, &response); });
    if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
    if (json_) {
      PrintJson({{"token_ids", std::vector<uint32_t>(response.token_ids().begin(), response.token_ids().end())}});
    } else {
      std::puts(Joined(response.token_ids()).c_str());
    }
    return kExitOk;
  }

 private:
  PromptSource prompt_;
};

class DetokenizeCommand : public Command {
 public:
  explicit DetokenizeCommand(CLI::App* program) : Command(program->add_subcommand("detokenize", "Text of token ids")) {
    app_->add_option("--token-ids", ids_, "Such as 2,5,7")->required()->delimiter(',')->allow_extra_args(false);
    app_->add_flag("--keep-special", keep_special_, "Write special tokens such as </s> too");
    AddJsonFlag();
  }

  int Run(Connection* connection) override {
    v1::DetokenizeRequest request;
    request.mutable_token_ids()->Add(ids_.begin(), ids_.end());
    request.set_skip_special_tokens(!keep_special_);
    v1::DetokenizeResponse response;
    const grpc::Status status = connection->Call(
        [&](Attempt* attempt) { return connection->generation().Detokenize(&attempt->context, request, &response); });
    if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
    if (json_) {
      PrintJson({{"text", response.text()}});
    } else {
      std::fwrite(response.text().data(), 1, response.text().size(), stdout);
      std::puts("");
    }
    return kExitOk;
  }

 private:
  std::vector<uint32_t> ids_;
  bool keep_special_ = false;
};

class InfoCommand : public Command {
 public:
  explicit InfoCommand(CLI::App* program)
      : Command(program->add_subcommand("info", "The server, its limits and load, and the model")) {
    AddJsonFlag();
  }

  // A server that is still loading has no model to tell of; that is no failure.
  int Run(Connection* connection) override {
    v1::GetServerInfoResponse server;
    grpc::Status status = connection->CallOnce([&](Attempt* attempt) {
      return connection->generation().GetServerInfo(&attempt->context, v1::GetServerInfoRequest(), &server);
    });
    if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
    v1::GetModelInfoResponse model;
    status = connection->CallOnce([&](Attempt* attempt) {
      return connection->generation().GetModelInfo(&attempt->context, v1::GetModelInfoRequest(), &model);
    });
    const bool has_model = status.ok();
    if (!has_model && status.error_code() != grpc::StatusCode::UNAVAILABLE) {
      return ReportFailure(status, connection->interrupted(), json_);
    }
    if (json_) {
      PrintJson({{"server", ServerJson(server)}, {"model", has_model ? ModelJson(model) : Json()}});
    } else {
      PrintFields("server", ServerJson(server));
      if (has_model) PrintFields("model", ModelJson(model));
    }
    return kExitOk;
  }

 private:
  static Json ServerJson(const v1::GetServerInfoResponse& server) {
    const v1::Limits& limits = server.limits();
    Json json = {{"version", server.version()},
                 {"state", StateName(server.state())},
                 {"model", server.model()},
                 {"backend", server.backend()},
                 {"synthetic", server.synthetic()},
                 {"uptime_seconds", server.uptime_seconds()},
                 {"limits",
                  {{"max_batch", limits.max_batch()},
                   {"max_waiting_requests", limits.max_waiting_requests()},
                   {"default_max_new_tokens", limits.default_max_new_tokens()},
                   {"max_top_logprobs", limits.max_top_logprobs()},
                   {"max_stop_strings", limits.max_stop_strings()},
                   {"max_stop_string_bytes", limits.max_stop_string_bytes()},
                   {"max_stop_token_ids", limits.max_stop_token_ids()},
                   {"max_logit_bias", limits.max_logit_bias()},
                   {"max_message_bytes", limits.max_message_bytes()}}},
                 {"sparsity", ToJson(server.sparsity())}};
    // Where tokens are asked for, tenants are told of themselves alone.
    if (server.has_load()) json["load"] = LoadJson(server.load());
    if (server.has_tenant()) json["tenant"] = TenantJson(server.tenant());
    return json;
  }

  static Json LoadJson(const v1::Load& load) {
    return {{"running_requests", load.running_requests()},
            {"waiting_requests", load.waiting_requests()},
            {"kv_blocks_total", load.kv_blocks_total()},
            {"kv_blocks_free", load.kv_blocks_free()},
            {"steps", load.steps()},
            {"prompt_tokens", load.prompt_tokens()},
            {"generated_tokens", load.generated_tokens()}};
  }

  static Json TenantJson(const v1::TenantInfo& tenant) {
    Json json = {{"tenant", tenant.tenant()},
                 {"highest_tier", TierName(tenant.highest_tier())},
                 {"lowest_tier", TierName(tenant.lowest_tier())},
                 {"live_requests", tenant.live_requests()},
                 {"requests_used", tenant.requests_used()},
                 {"tokens_used", tenant.tokens_used()},
                 {"busy", tenant.busy()}};
    if (tenant.has_requests_per_minute()) json["requests_per_minute"] = tenant.requests_per_minute();
    if (tenant.has_tokens_per_minute()) json["tokens_per_minute"] = tenant.tokens_per_minute();
    if (tenant.has_concurrent_requests()) json["concurrent_requests"] = tenant.concurrent_requests();
    return json;
  }

  static Json ModelJson(const v1::GetModelInfoResponse& model) {
    return {{"model", model.model()},
            {"architecture", model.architecture()},
            {"layers", model.layers()},
            {"hidden_size", model.hidden_size()},
            {"attention_heads", model.attention_heads()},
            {"ffn_size", model.ffn_size()},
            {"vocabulary_size", model.vocabulary_size()},
            {"context_tokens", model.context_tokens()},
            {"weight_dtype", model.weight_dtype()},
            {"weight_bytes", model.weight_bytes()},
            {"has_tokenizer", model.has_tokenizer()},
            {"bos_token_id", model.bos_token_id()},
            {"eos_token_id", model.eos_token_id()},
            {"eos_token_ids", std::vector<uint32_t>(model.eos_token_ids().begin(), model.eos_token_ids().end())}};
  }

  static void PrintFields(const std::string& title, const Json& fields) {
    std::printf("%s\n", title.c_str());
    for (const auto& [name, value] : fields.items()) {
      if (value.is_object()) {
        PrintFields(absl::StrCat(title, " ", name), value);
      } else {
        const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
        std::printf("  %-24s %s\n", name.c_str(), text.c_str());
      }
    }
  }
};

class HealthCommand : public Command {
 public:
  explicit HealthCommand(CLI::App* program)
      : Command(program->add_subcommand("health", "Whether the server serves: exit code 0 only for SERVING")) {
    app_->add_option("--service", service_, "Name to ask for, such as liveness; without it, the server as a whole");
    app_->add_flag("--watch", watch_, "Stay, and write a line for every change");
    AddJsonFlag();
  }

  absl::Status Prepare() override { return CheckUtf8("--service", service_); }

  int Run(Connection* connection) override {
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service_);
    grpc::health::v1::HealthCheckResponse response;
    const grpc::Status status = connection->CallOnce([&](Attempt* attempt) {
      if (!watch_) return connection->health().Check(&attempt->context, request, &response);
      const auto reader = connection->health().Watch(&attempt->context, request);
      while (reader->Read(&response)) Print(response);
      return reader->Finish();
    });
    if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
    if (!watch_) Print(response);
    return response.status() == grpc::health::v1::HealthCheckResponse::SERVING ? kExitOk : kExitFailed;
  }

 private:
  void Print(const grpc::health::v1::HealthCheckResponse& response) const {
    const std::string& name = grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status());
    if (json_) {
      PrintJson({{"status", name}});
    } else {
      std::puts(name.c_str());
      std::fflush(stdout);
    }
  }

  std::string service_;
  bool watch_ = false;
};

class AbortCommand : public Command {
 public:
  explicit AbortCommand(CLI::App* program)
      : Command(program->add_subcommand("abort", "End a running or waiting request; exit code 1 when there is none")) {
    app_->add_option("request_id", request_id_, "As given or returned by generate")->required();
    AddJsonFlag();
  }

  absl::Status Prepare() override { return CheckUtf8("request_id", request_id_); }

  int Run(Connection* connection) override {
    v1::AbortRequest request;
    request.set_request_id(request_id_);
    v1::AbortResponse response;
    const grpc::Status status = connection->CallOnce(
        [&](Attempt* attempt) { return connection->generation().Abort(&attempt->context, request, &response); });
    if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
    if (json_) {
      PrintJson({{"found", response.found()}});
    } else {
      std::puts(response.found() ? "aborted" : "no such request");
    }
    return response.found() ? kExitOk : kExitFailed;
  }

 private:
  std::string request_id_;
};

}  // namespace

std::vector<std::unique_ptr<Command>> MakeOtherCommands(CLI::App* program) {
  std::vector<std::unique_ptr<Command>> commands;
  commands.push_back(std::make_unique<ScoreCommand>(program));
  commands.push_back(std::make_unique<TokenizeCommand>(program));
  commands.push_back(std::make_unique<DetokenizeCommand>(program));
  commands.push_back(std::make_unique<InfoCommand>(program));
  commands.push_back(std::make_unique<HealthCommand>(program));
  commands.push_back(std::make_unique<AbortCommand>(program));
  return commands;
}

}  // namespace dejavu
