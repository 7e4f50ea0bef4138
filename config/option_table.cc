#include "config/option_table.h"

#include <algorithm>
#include <charconv>
#include <numeric>
#include <type_traits>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

absl::Status CheckAddress(absl::string_view value) {
  if (IsHostAndPort(value)) return absl::OkStatus();
  return absl::InvalidArgumentError("must be HOST:PORT with a port from 0 to 65535, an IPv6 address in brackets");
}

absl::Status CheckAddressIfAny(absl::string_view value) {
  return value.empty() ? absl::OkStatus() : CheckAddress(value);
}

std::string NumberText(double value) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed);
  return std::string(text, error == std::errc() ? end : text);
}

template <typename Number>
bool ParseNumber(absl::string_view text, Number* value) {
  if constexpr (std::is_same_v<Number, double>) {
    return absl::SimpleAtod(text, value);
  } else {
    return absl::SimpleAtoi(text, value);
  }
}

int EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

// By Tier: config links no engine, whose Name(Tier) says the same (config_test compares them).
std::vector<std::string> TierNames() { return {"dense", "exact", "high", "balanced", "fast"}; }

}  // namespace

std::vector<Option> OptionTable(Config* config) {
  EngineOptions& e = config->engine;
  ServerOptions& s = config->server;
  constexpr double kGib = 1 << 30;
  const std::vector<std::string> tiers = TierNames();
  return {
      {.key = "model",
       .group = "Model",
       .help = "directory of the checkpoint, in Hugging Face layout, or a name such as synthetic:opt-1.3b",
       .target = &e.model},
      {.key = "weights",
       .group = "Model",
       .help = "type of the weights in memory; int8: a factor per row",
       .target = &e.weights,
       .choices = {"stored", "fp32", "fp16", "bf16", "int8"}},
      {.key = "predictor",
       .group = "Model",
       .help = "predictor of the sparse tiers; empty: predictor.safetensors in the model's directory, if there, or a "
               "synthetic model's own; none: never",
       .target = &e.predictor},
      {.key = "served_model_name",
       .group = "Model",
       .help = "name that requests may give; empty: last part of the directory",
       .target = &s.served_model_name},

      {.key = "listen",
       .group = "Server",
       .help = "HOST:PORT to listen on; port 0: any free one",
       .target = &s.listen,
       .check = CheckAddress},
      {.key = "port_file",
       .group = "Server",
       .help = "file to write the port number to once the server listens; empty: none",
       .target = &s.port_file},
      {.key = "reflection",
       .group = "Server",
       .help = "let clients such as grpcurl list the services",
       .target = &s.reflection},

      {.key = "device",
       .group = "Compute",
       .help = "device that computes; auto: a GPU if there is one, else the CPU",
       .target = &e.device,
       .choices = {"auto", "cpu", "cuda"}},
      {.key = "memory_share",
       .group = "Compute",
       .help = "share of the device's free memory that may be taken",
       .target = &e.memory_share,
       .limits = EngineOptions::kMemoryShare},
      {.key = "threads",
       .group = "Compute",
       .help = "CPU threads of a step; 0: one per CPU that the process may use",
       .target = &e.threads,
       .limits = EngineOptions::kThreads},
      {.key = "pin_threads",
       .group = "Compute",
       .help = "keep each thread on a CPU of its own",
       .target = &e.pin_threads},
      {.key = "tensor_parallel",
       .group = "Compute",
       .help = "ranks that hold the model, each a part of the threads or a GPU; under mpirun the processes are the "
               "ranks; 0: those, or one",
       .target = &e.tensor_parallel,
       .limits = EngineOptions::kTensorParallel},
      {.key = "peer_timeout_s",
       .group = "Compute",
       .help = "seconds after which a rank that others wait for means that the engine has failed; 0: never",
       .target = &e.peer_timeout_s,
       .limits = kTimeLimits},

      {.key = "scheduler.max_batch",
       .group = "Scheduler",
       .help = "sequences that run at once",
       .target = &e.scheduler.max_batch,
       .limits = SchedulerOptions::kMaxBatch},
      {.key = "scheduler.max_step_tokens",
       .group = "Scheduler",
       .help = "most tokens of one step, prompts and outputs together",
       .target = &e.scheduler.max_step_tokens,
       .limits = SchedulerOptions::kMaxStepTokens},
      {.key = "scheduler.prefill_chunk_tokens",
       .group = "Scheduler",
       .help = "most prompt tokens of one sequence in a step",
       .target = &e.scheduler.prefill_chunk_tokens,
       .limits = SchedulerOptions::kPrefillChunkTokens},
      {.key = "scheduler.max_waiting_requests",
       .group = "Scheduler",
       .help = "requests that may wait; one more is refused",
       .target = &e.admission.max_waiting_requests,
       .limits = AdmissionOptions::kMaxWaitingRequests},
      {.key = "scheduler.max_waiting_tokens",
       .group = "Scheduler",
       .help = "tokens of the prompts that may wait; 0: no limit",
       .target = &e.admission.max_waiting_tokens,
       .limits = AdmissionOptions::kMaxWaitingTokens},
      {.key = "scheduler.tenant_max_waiting_requests",
       .group = "Scheduler",
       .help = "requests of one tenant that may wait; 0: no limit",
       .target = &e.admission.tenant_max_waiting_requests,
       .limits = AdmissionOptions::kTenantMaxWaitingRequests},
      {.key = "scheduler.tenant_max_waiting_tokens",
       .group = "Scheduler",
       .help = "tokens of one tenant's prompts that may wait; 0: no limit",
       .target = &e.admission.tenant_max_waiting_tokens,
       .limits = AdmissionOptions::kMaxWaitingTokens},
      {.key = "scheduler.tenant_weights",
       .group = "Scheduler",
       .help = "shares of tenants, such as free=1,paying=3, where their requests compete; 1 for those not named",
       .target = &e.scheduler.tenant_weights},
      {.key = "scheduler.ageing_s",
       .group = "Scheduler",
       .help = "seconds after which a request that waits gets every eighth admission",
       .target = &e.scheduler.ageing_s,
       .limits = kTimeLimits},
      {.key = "scheduler.inter_token_target_ms",
       .group = "Scheduler",
       .help = "time between two tokens that prompts of others shall not exceed, where a request names none; 0: see "
               "prefill_share",
       .target = &e.scheduler.inter_token_target_ms,
       .limits = kTimeLimits},
      {.key = "scheduler.prefill_share",
       .group = "Scheduler",
       .help = "without such a target: what prompts may add to a step, as a share of it",
       .target = &e.scheduler.prefill_share,
       .limits = SchedulerOptions::kPrefillShare},
      {.key = "scheduler.deadline_slack",
       .group = "Scheduler",
       .help = "a request is refused when it is predicted to take longer than so many times what its deadline leaves; "
               "0: never",
       .target = &e.admission.deadline_slack,
       .limits = AdmissionOptions::kDeadlineSlack},
      {.key = "scheduler.watchdog_s",
       .group = "Scheduler",
       .help = "seconds after which a step that has not ended means that the engine has failed; 0: never",
       .target = &e.watchdog_s,
       .limits = kTimeLimits},
      {.key = "scheduler.fault",
       .group = "Scheduler",
       .help = "for tests: throw@STEP or hang@STEP breaks that step; empty: none",
       .target = &e.fault},

      {.key = "kv.block_tokens",
       .group = "Keys and values",
       .help = "positions in one block of memory",
       .target = &e.kv.block_tokens,
       .limits = KvOptions::kBlockTokens},
      {.key = "kv.dtype",
       .group = "Keys and values",
       .help = "type of keys and values in memory",
       .target = &e.kv.dtype,
       .choices = {"fp16", "fp32"}},
      {.key = "kv.overcommit",
       .group = "Keys and values",
       .help = "take memory as sequences grow, and where none is left compute the youngest again later; else all is "
               "reserved",
       .target = &e.scheduler.overcommit},
      {.key = "kv.prefix_cache",
       .group = "Keys and values",
       .help = "share the blocks of prompts that begin alike",
       .target = &e.kv.prefix_cache},
      {.key = "kv.memory_mib",
       .group = "Keys and values",
       .help = "memory in MiB; 0: full context for scheduler.max_batch sequences, or what memory_share leaves for them",
       .target = &e.kv.memory_mib,
       .limits = KvOptions::kMemoryMib},

      {.key = "limits.default_max_new_tokens",
       .group = "Limits of a request",
       .help = "new tokens where the request names no number",
       .target = &s.default_max_new_tokens,
       .limits = {1, 1000000}},
      {.key = "limits.max_top_logprobs",
       .group = "Limits of a request",
       .help = "most alternatives per token",
       .target = &s.max_top_logprobs,
       .limits = {0, 1000}},
      {.key = "limits.max_stop_strings",
       .group = "Limits of a request",
       .help = "most stop strings",
       .target = &s.max_stop_strings,
       .limits = {0, 64}},
      {.key = "limits.max_stop_string_bytes",
       .group = "Limits of a request",
       .help = "most bytes of one stop string",
       .target = &s.max_stop_string_bytes,
       .limits = {1, 4096}},
      {.key = "limits.max_stop_token_ids",
       .group = "Limits of a request",
       .help = "most stop token ids",
       .target = &s.max_stop_token_ids,
       .limits = {0, 1024}},
      {.key = "limits.max_logit_bias",
       .group = "Limits of a request",
       .help = "most logit bias entries",
       .target = &s.max_logit_bias,
       .limits = {0, 100000}},
      {.key = "limits.max_samples",
       .group = "Limits of a request",
       .help = "most samples of one prompt",
       .target = &s.max_samples,
       .limits = {1, 1024}},

      {.key = "sparsity.default_tier",
       .group = "Sparsity",
       .help = "tier where the request names none",
       .target = &s.default_tier,
       .choices = tiers},
      {.key = "sparsity.highest_tier",
       .group = "Sparsity",
       .help = "best quality that a request may ask for",
       .target = &s.highest_tier,
       .choices = tiers},
      {.key = "sparsity.lowest_tier",
       .group = "Sparsity",
       .help = "lowest quality that a request may ask for",
       .target = &s.lowest_tier,
       .choices = tiers},
      {.key = "sparsity.shadow_every",
       .group = "Sparsity",
       .help =
           "compare one in so many decoded tokens with its dense result, where the request names no number; 0: none",
       .target = &s.shadow_every,
       .limits = {0, kMaxShadowEvery}},
      {.key = "sparsity.min_shadow_every",
       .group = "Sparsity",
       .help = "smallest such number but 0 that a request may name",
       .target = &s.min_shadow_every,
       .limits = {1, kMaxShadowEvery}},
      {.key = "sparsity.fallback",
       .group = "Sparsity",
       .help = "let a layer whose comparisons fail run exact until they pass again",
       .target = &e.shadow_fallback},

      {.key = "transport.max_message_bytes",
       .group = "Transport",
       .help = "most bytes of one request",
       .target = &s.max_message_bytes,
       .limits = {1024, kGib}},
      {.key = "transport.max_outbox_bytes",
       .group = "Transport",
       .help = "bytes that a stream's client may leave unread before the stream ends",
       .target = &s.max_outbox_bytes,
       .limits = {1024, kGib}},
      {.key = "transport.max_concurrent_streams",
       .group = "Transport",
       .help = "requests at once per connection; more wait in the client",
       .target = &s.max_concurrent_streams,
       .limits = {1, 100000}},
      {.key = "transport.memory_mib",
       .group = "Transport",
       .help = "memory of gRPC in MiB, for all connections together",
       .target = &s.max_transport_mib,
       .limits = {16, 1 << 20}},

      {.key = "connection.max_age_s",
       .group = "Transport",
       .help = "seconds after which a connection is told to go, give or take a tenth, so that new replicas get calls; "
               "0: never",
       .target = &s.connection_max_age_s,
       .limits = {0, 1e6}},
      {.key = "connection.max_age_grace_s",
       .group = "Transport",
       .help = "seconds that requests on it may still take; 0: no limit",
       .target = &s.connection_max_age_grace_s,
       .limits = {0, 1e6}},

      {.key = "tls.cert",
       .group = "Security",
       .help = "PEM file of the server's certificate and its chain; empty: plain text",
       .target = &s.tls_cert},
      {.key = "tls.key", .group = "Security", .help = "PEM file of the certificate's key", .target = &s.tls_key},
      {.key = "tls.client_ca",
       .group = "Security",
       .help = "PEM file of authorities; clients must show a certificate of theirs; empty: any may",
       .target = &s.tls_client_ca},
      {.key = "tls.reload_s",
       .group = "Security",
       .help = "seconds between two looks at these files and auth.tokens_file",
       .target = &s.tls_reload_s,
       .limits = {0.1, 86400}},
      {.key = "auth.tokens_file",
       .group = "Security",
       .help = "file of lines TENANT:SHA256 of the bearer tokens that callers must send; empty: everybody may call",
       .target = &s.auth_tokens_file},
      {.key = "auth.admin_tenant",
       .group = "Security",
       .help = "tenant whose tokens the operators' AdminService takes",
       .target = &s.auth_admin_tenant},
      {.key = "auth.allow_plaintext",
       .group = "Security",
       .help = "take tokens without TLS on an address that is not loopback",
       .target = &s.auth_allow_plaintext},

      {.key = "health.listen",
       .group = "Security",
       .help = "HOST:PORT of the health service alone, in plain text and without tokens, for probes; empty: none",
       .target = &s.health_listen,
       .check = CheckAddressIfAny},
      {.key = "health.port_file",
       .group = "Security",
       .help = "file to write that port number to; empty: none",
       .target = &s.health_port_file},

      {.key = "metrics.listen",
       .group = "Metrics",
       .help = "HOST:PORT of Prometheus' /metrics and a status page, plain HTTP; empty: none",
       .target = &s.metrics_listen},
      {.key = "metrics.port_file",
       .group = "Metrics",
       .help = "file to write that port to; empty: none",
       .target = &s.metrics_port_file},
      {.key = "metrics.count",
       .group = "Metrics",
       .help = "count what the engine does; false only to see what that costs",
       .target = &e.metrics.count},
      {.key = "metrics.edges",
       .group = "Metrics",
       .help = "edges of histograms, such as inter_token_latency_seconds=0.001,0.01,0.1;batch_size=1,4,16",
       .target = &e.metrics.edges},
      {.key = "metrics.per_layer",
       .group = "Metrics",
       .help = "two gauges for every layer",
       .target = &s.metrics_per_layer},
      {.key = "metrics.slo_ttft_ms",
       .group = "Metrics",
       .help = "requests whose first token takes longer miss their target; 0: no target",
       .target = &e.metrics.slo_ttft_ms,
       .limits = MetricsOptions::kSlo},
      {.key = "metrics.slo_itl_ms",
       .group = "Metrics",
       .help = "the same of the mean time between two tokens; 0: no target",
       .target = &e.metrics.slo_itl_ms,
       .limits = MetricsOptions::kSlo},

      {.key = "admin.listen",
       .group = "Operators",
       .help = "HOST:PORT of the operators' AdminService, which without tokens whoever reaches it may use; empty: off",
       .target = &s.admin_listen,
       .check = CheckAddressIfAny},
      {.key = "admin.port_file",
       .group = "Operators",
       .help = "file to write that port number to; empty: none",
       .target = &s.admin_port_file},

      {.key = "drain.timeout_s",
       .group = "Stopping",
       .help = "seconds after SIGTERM that running requests may still take",
       .target = &s.drain_timeout_s,
       .limits = {0, 86400}},
      {.key = "drain.linger_ms",
       .group = "Stopping",
       .help = "milliseconds after SIGTERM in which new requests are still taken",
       .target = &s.drain_linger_ms,
       .limits = {0, 600000}},
      {.key = "drain.goaway_ms",
       .group = "Stopping",
       .help = "milliseconds after that in which connections still answer; then they are told to go, while what runs "
               "goes on; 0: when all has ended",
       .target = &s.drain_goaway_ms,
       .limits = {0, 86400000}},
      {.key = "drain.queue",
       .group = "Stopping",
       .help = "let requests that wait at SIGTERM run too; else they are refused",
       .target = &s.drain_queue},

      {.key = "log.termination_file",
       .group = "Logs",
       .help = "file that gets the reason when the daemon exits with a failure; empty: none",
       .target = &s.log_termination_file},
      {.key = "log.level",
       .group = "Logs",
       .help = "least severe message that is written",
       .target = &s.log_level,
       .choices = {"trace", "debug", "info", "warn", "error"}},
      {.key = "log.format",
       .group = "Logs",
       .help = "form of the lines on standard error",
       .target = &s.log_format,
       .choices = {"text", "json"}},
      {.key = "log.access", .group = "Logs", .help = "write a line about every request", .target = &s.log_access},
      {.key = "log.prompt_chars",
       .group = "Logs",
       .help = "characters of a prompt's text in that line; 0: never any",
       .target = &s.log_prompt_chars,
       .limits = {0, 100000}},
      {.key = "log.engine_every_s",
       .group = "Logs",
       .help = "seconds between two lines about the engine while it works; 0: none",
       .target = &s.log_engine_every_s,
       .limits = {0, 86400}},

      {.key = "trace.otlp_endpoint",
       .group = "Traces",
       .help = "HOST:PORT of a collector that takes OTLP over plain gRPC; empty: no traces",
       .target = &s.trace_otlp_endpoint,
       .check = CheckAddressIfAny},
      {.key = "trace.sample_ratio",
       .group = "Traces",
       .help = "share of the requests without a traceparent that are traced; those with one say it themselves",
       .target = &s.trace_sample_ratio,
       .limits = {0, 1}},
      {.key = "trace.max_queue",
       .group = "Traces",
       .help = "spans that may wait for the collector; more are dropped",
       .target = &s.trace_max_queue,
       .limits = {1, 1000000}},
  };
}

std::string FlagName(absl::string_view key) {
  return absl::StrCat("--", absl::StrReplaceAll(key, {{".", "-"}, {"_", "-"}}));
}

std::string EnvironmentName(absl::string_view key) {
  return absl::StrCat("DEJAVUD_", absl::AsciiStrToUpper(absl::StrReplaceAll(key, {{".", "_"}})));
}

std::string LimitText(const Option& option) {
  if (option.is_bool()) return "true or false";
  if (!option.is_text()) return absl::StrCat(NumberText(option.limits.least), " to ", NumberText(option.limits.most));
  if (option.choices.empty()) return "";
  const auto last = option.choices.end() - 1;
  return absl::StrCat(absl::StrJoin(option.choices.begin(), last, ", "), " or ", *last);
}

absl::Status SetOption(const Option& option, absl::string_view text) {
  const auto refuse = [&](absl::string_view limit) {
    return absl::InvalidArgumentError(absl::StrCat(option.key, " is \"", text, "\"; ", limit));
  };
  return std::visit(
      [&](auto* target) -> absl::Status {
        using Value = std::remove_pointer_t<decltype(target)>;
        if constexpr (std::is_same_v<Value, std::string>) {
          if (!IsValidUtf8(text)) return absl::InvalidArgumentError(absl::StrCat(option.key, " is not valid UTF-8"));
          if (text.find('\0') != text.npos) return refuse("a zero byte is not allowed");
          if (!option.choices.empty() && std::count(option.choices.begin(), option.choices.end(), text) == 0) {
            return refuse(absl::StrCat("must be ", LimitText(option)));
          }
          if (option.check != nullptr) {
            const absl::Status checked = option.check(text);
            if (!checked.ok()) return refuse(checked.message());
          }
          *target = std::string(text);
        } else if constexpr (std::is_same_v<Value, Tier>) {
          const auto found = std::find(option.choices.begin(), option.choices.end(), text);
          if (found == option.choices.end()) return refuse(absl::StrCat("must be ", LimitText(option)));
          *target = static_cast<Tier>(found - option.choices.begin());
        } else if constexpr (std::is_same_v<Value, bool>) {
          if (text != "true" && text != "false") return refuse("must be true or false");
          *target = text == "true";
        } else {
          Value value = 0;
          const bool in_range =
              ParseNumber(text, &value) && value >= option.limits.least && value <= option.limits.most;
          const char* type = std::is_same_v<Value, double> ? "number" : "whole number";
          if (!in_range) return refuse(absl::StrCat("must be a ", type, ", ", LimitText(option)));
          *target = value;
        }
        return absl::OkStatus();
      },
      option.target);
}

std::string OptionText(const Option& option) {
  return std::visit(
      [&](auto* target) -> std::string {
        using Value = std::remove_pointer_t<decltype(target)>;
        if constexpr (std::is_same_v<Value, std::string>) {
          return *target;
        } else if constexpr (std::is_same_v<Value, Tier>) {
          return option.choices[static_cast<size_t>(*target)];
        } else if constexpr (std::is_same_v<Value, bool>) {
          return *target ? "true" : "false";
        } else if constexpr (std::is_same_v<Value, double>) {
          return NumberText(*target);
        } else {
          return absl::StrCat(*target);
        }
      },
      option.target);
}

std::string Nearest(absl::string_view wrong, const std::vector<std::string>& candidates) {
  std::string best;
  int best_distance = static_cast<int>(wrong.size()) / 3 + 1;  // further away it is a guess, not a typing error
  for (const std::string& candidate : candidates) {
    const int distance = EditDistance(wrong, candidate);
    if (distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
    // The right name without its section.
    const absl::string_view name = absl::string_view(candidate).substr(candidate.rfind('.') + 1);
    if (name == wrong) return candidate;
  }
  return best;
}

}  // namespace dejavu
