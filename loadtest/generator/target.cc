#include "loadtest/generator/target.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "dejavu/v1/generation.grpc.pb.h"
#include "google/protobuf/util/json_util.h"
#include "grpcpp/client_context.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

using Clock = std::chrono::system_clock;

constexpr double kMinWait_s = 1.0;
constexpr auto kUnaryTimeout = std::chrono::seconds(10);
constexpr size_t kMaxCorpusBytes = 64 << 20;
constexpr size_t kMeasuredBytes = 64 << 10;  // of the corpus, to learn how long a token is

void Prepare(const Metadata& metadata, Clock::time_point deadline, grpc::ClientContext* context) {
  context->set_deadline(deadline);
  for (const auto& [key, value] : metadata) context->AddMetadata(key, value);
}

// "key=value".
absl::StatusOr<Metadata> ParseMetadata(const std::vector<std::string>& entries) {
  Metadata metadata;
  for (const std::string& entry : entries) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(entry, absl::MaxSplits('=', 1));
    if (parts.first.empty() || parts.first.size() == entry.size()) {
      return absl::InvalidArgumentError(absl::StrCat("--metadata: '", entry, "' is not KEY=VALUE"));
    }
    metadata.push_back(parts);
  }
  return metadata;
}

absl::Status FromGrpc(const std::string& what, const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      absl::StrCat(what, ": ", status.error_message()));
}

// Health checks (the service config's) hold calls back until the server is ready: one call that waits, because between
// calls nobody reads what Watch says.
absl::Status AwaitServing(const RunOptions& options, const Metadata& metadata, v1::GenerationService::Stub* stub,
                          v1::GetServerInfoResponse* info) {
  const double wait_s = std::max(options.wait_s, kMinWait_s);
  const auto deadline =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(wait_s));
  grpc::ClientContext context;
  Prepare(metadata, deadline, &context);
  context.set_wait_for_ready(true);
  const grpc::Status status = stub->GetServerInfo(&context, v1::GetServerInfoRequest(), info);
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
    return absl::UnavailableError(absl::StrCat("nobody served at ", options.server, " within ", wait_s, " s"));
  }
  if (!status.ok()) return FromGrpc(options.server, status);
  if (info->state() == v1::SERVER_STATE_SERVING) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(options.server, " takes no requests: it is in state ", v1::ServerState_Name(info->state())));
}

absl::StatusOr<std::string> ReadCorpus(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxCorpusBytes, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.empty()) return absl::InvalidArgumentError(absl::StrCat("cannot read --corpus ", path));
  // The end may have cut a character.
  text.resize(text.size() < kMaxCorpusBytes ? text.size() : ValidUtf8Prefix(text));
  return text;
}

}  // namespace

absl::StatusOr<Target> Connect(const RunOptions& options) {
  Target target;
  ASSIGN_OR_RETURN(target.metadata, ParseMetadata(options.metadata));
  ChannelOptions channel_options = options.channel;
  channel_options.retry = false;
  for (int i = 0; i < options.connections; ++i) {
    ASSIGN_OR_RETURN(auto channel, MakeChannel(options.server, channel_options));
    target.channels.push_back(std::move(channel));
  }
  const auto stub = v1::GenerationService::NewStub(target.channels[0]);
  RETURN_IF_ERROR(AwaitServing(options, target.metadata, stub.get(), &target.server));
  grpc::ClientContext context;
  Prepare(target.metadata, Clock::now() + kUnaryTimeout, &context);
  v1::GetModelInfoRequest request;
  request.set_model(options.model);
  const grpc::Status status = stub->GetModelInfo(&context, request, &target.model);
  if (!status.ok()) return FromGrpc("GetModelInfo", status);
  if (target.model.vocabulary_size() < 2 || target.model.context_tokens() < 2) {
    return absl::InternalError(absl::StrCat("the model has a vocabulary of ", target.model.vocabulary_size(),
                                            " and a context of ", target.model.context_tokens()));
  }
  for (const auto& channel : target.channels) {
    if (!channel->WaitForConnected(Clock::now() + kUnaryTimeout)) {
      return absl::UnavailableError(absl::StrCat("no connection to ", options.server));
    }
  }
  return target;
}

absl::StatusOr<Prompts> MakePrompts(const RunOptions& options, const Target& target) {
  if (options.corpus.empty()) return Prompts::Synthetic(target.model.vocabulary_size(), target.model.bos_token_id());
  ASSIGN_OR_RETURN(std::string text, ReadCorpus(options.corpus));
  v1::TokenizeRequest request;
  request.set_text(text.substr(0, std::min(kMeasuredBytes, text.size())));
  request.mutable_text()->resize(ValidUtf8Prefix(request.text()));
  const auto stub = v1::GenerationService::NewStub(target.channels[0]);
  grpc::ClientContext context;
  Prepare(target.metadata, Clock::now() + kUnaryTimeout, &context);
  v1::TokenizeResponse tokens;
  const grpc::Status status = stub->Tokenize(&context, request, &tokens);
  if (!status.ok()) return FromGrpc("--corpus needs the server's Tokenize", status);
  const double bytes_per_token = static_cast<double>(request.text().size()) / std::max(1, tokens.token_ids_size());
  return Prompts::Corpus(std::move(text), bytes_per_token);
}

nlohmann::ordered_json InfoJson(const v1::GetServerInfoResponse& info) {
  std::string text;
  google::protobuf::util::JsonPrintOptions print;
  print.always_print_primitive_fields = true;
  print.preserve_proto_field_names = true;
  if (!google::protobuf::util::MessageToJsonString(info, &text, print).ok()) return nullptr;
  return nlohmann::ordered_json::parse(text);
}

}  // namespace dejavu
