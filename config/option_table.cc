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

// "127.0.0.1:50051", "[::1]:0", "host.name:80".
absl::Status CheckListen(absl::string_view value) {
  const size_t colon = value.rfind(':');
  const absl::string_view host = value.substr(0, colon == value.npos ? 0 : colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  uint32_t port = 0;
  const absl::string_view digits = value.substr(host.size() + (colon == value.npos ? 0 : 1));
  const bool port_ok = !digits.empty() && digits.find_first_not_of("0123456789") == digits.npos &&
                       absl::SimpleAtoi(digits, &port) && port <= 65535;
  const bool host_ok = !host.empty() && (bracketed || host.find_first_of(": []/") == host.npos);
  if (colon != value.npos && port_ok && host_ok) return absl::OkStatus();
  return absl::InvalidArgumentError("must be HOST:PORT with a port from 0 to 65535, an IPv6 address in brackets");
}

absl::Status CheckAddressIfAny(absl::string_view value) {
  return value.empty() ? absl::OkStatus() : CheckListen(value);
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
      {"model", "Model", "directory of the checkpoint, in Hugging Face layout, or a name such as synthetic:opt-1.3b",
       &e.model},
      {"weights",
       "Model",
       "type of the weights in memory; int8: a factor per row",
       &e.weights,
       0,
       0,
       {"stored", "fp32", "fp16", "bf16", "int8"}},
      {"predictor", "Model",
       "predictor of the sparse tiers; empty: predictor.safetensors in the model's directory, if there, or a synthetic "
       "model's own; none: never",
       &e.predictor},
      {"served_model_name", "Model", "name that requests may give; empty: last part of the directory",
       &s.served_model_name},

      {"listen", "Server", "HOST:PORT to listen on; port 0: any free one", &s.listen, 0, 0, {}, CheckListen},
      {"port_file", "Server", "file to write the port number to once the server listens; empty: none", &s.port_file},
      {"reflection", "Server", "let clients such as grpcurl list the services", &s.reflection},

      {"device",
       "Compute",
       "device that computes; auto: a GPU if there is one, else the CPU",
       &e.device,
       0,
       0,
       {"auto", "cpu", "cuda"}},
      {"memory_share", "Compute", "share of the device's free memory that may be taken", &e.memory_share, 0.01, 1},
      {"threads", "Compute", "CPU threads of a step; 0: one per CPU that the process may use", &e.threads, 0, 1024},
      {"pin_threads", "Compute", "keep each thread on a CPU of its own", &e.pin_threads},
      {"tensor_parallel", "Compute",
       "ranks that hold the model, each a part of the threads or a GPU; under mpirun the processes are the ranks; 0: "
       "those, "
       "or one",
       &e.tensor_parallel, 0, 64},
      {"peer_timeout_s", "Compute",
       "seconds after which a rank that others wait for means that the engine has failed; 0: never", &e.peer_timeout_s,
       0, 1e6},

      {"scheduler.max_batch", "Scheduler", "sequences that run at once", &e.max_batch, 1, 1024},
      {"scheduler.max_step_tokens", "Scheduler", "most tokens of one step, prompts and outputs together",
       &e.max_step_tokens, 1, 65536},
      {"scheduler.prefill_chunk_tokens", "Scheduler", "most prompt tokens of one sequence in a step",
       &e.prefill_chunk_tokens, 1, 65536},
      {"scheduler.max_waiting_requests", "Scheduler", "requests that may wait; one more is refused",
       &e.max_waiting_requests, 1, 65536},
      {"scheduler.max_waiting_tokens", "Scheduler", "tokens of the prompts that may wait; 0: no limit",
       &e.max_waiting_tokens, 0, 1e12},
      {"scheduler.tenant_max_waiting_requests", "Scheduler", "requests of one tenant that may wait; 0: no limit",
       &e.tenant_max_waiting_requests, 0, 65536},
      {"scheduler.tenant_max_waiting_tokens", "Scheduler", "tokens of one tenant's prompts that may wait; 0: no limit",
       &e.tenant_max_waiting_tokens, 0, 1e12},
      {"scheduler.tenant_weights", "Scheduler",
       "shares of tenants, such as free=1,paying=3, where their requests compete; 1 for those not named",
       &e.tenant_weights},
      {"scheduler.ageing_s", "Scheduler", "seconds after which a request that waits gets every eighth admission",
       &e.ageing_s, 0, 1e6},
      {"scheduler.inter_token_target_ms", "Scheduler",
       "time between two tokens that prompts of others shall not exceed, where a request names none; 0: see "
       "prefill_share",
       &e.inter_token_target_ms, 0, 1e6},
      {"scheduler.prefill_share", "Scheduler",
       "without such a target: what prompts may add to a step, as a share of it", &e.prefill_share, 0, 1e6},
      {"scheduler.deadline_slack", "Scheduler",
       "a request is refused when it is predicted to take longer than so many times what its deadline leaves; 0: never",
       &e.deadline_slack, 0, 1e6},
      {"scheduler.watchdog_s", "Scheduler",
       "seconds after which a step that has not ended means that the engine has failed; 0: never", &e.watchdog_s, 0,
       1e6},
      {"scheduler.fault", "Scheduler", "for tests: throw@STEP or hang@STEP breaks that step; empty: none", &e.fault},

      {"kv.block_tokens", "Keys and values", "positions in one block of memory", &e.kv_block_tokens, 1, 1024},
      {"kv.dtype", "Keys and values", "type of keys and values in memory", &e.kv_dtype, 0, 0, {"fp16", "fp32"}},
      {"kv.overcommit", "Keys and values",
       "take memory as sequences grow, and where none is left compute the youngest again later; else all is reserved",
       &e.kv_overcommit},
      {"kv.prefix_cache", "Keys and values", "share the blocks of prompts that begin alike", &e.prefix_cache},
      {"kv.memory_mib", "Keys and values",
       "memory in MiB; 0: full context for scheduler.max_batch sequences, or what memory_share leaves for them",
       &e.kv_mib, 0, 1 << 24},

      {"limits.default_max_new_tokens", "Limits of a request", "new tokens where the request names no number",
       &s.default_max_new_tokens, 1, 1000000},
      {"limits.max_top_logprobs", "Limits of a request", "most alternatives per token", &s.max_top_logprobs, 0, 1000},
      {"limits.max_stop_strings", "Limits of a request", "most stop strings", &s.max_stop_strings, 0, 64},
      {"limits.max_stop_string_bytes", "Limits of a request", "most bytes of one stop string", &s.max_stop_string_bytes,
       1, 4096},
      {"limits.max_stop_token_ids", "Limits of a request", "most stop token ids", &s.max_stop_token_ids, 0, 1024},
      {"limits.max_logit_bias", "Limits of a request", "most logit bias entries", &s.max_logit_bias, 0, 100000},
      {"limits.max_samples", "Limits of a request", "most samples of one prompt", &s.max_samples, 1, 1024},

      {"sparsity.default_tier", "Sparsity", "tier where the request names none", &s.default_tier, 0, 0, tiers},
      {"sparsity.highest_tier", "Sparsity", "best quality that a request may ask for", &s.highest_tier, 0, 0, tiers},
      {"sparsity.lowest_tier", "Sparsity", "lowest quality that a request may ask for", &s.lowest_tier, 0, 0, tiers},
      {"sparsity.shadow_every", "Sparsity",
       "compare one in so many decoded tokens with its dense result, where the request names no number; 0: none",
       &s.shadow_every, 0, kMaxShadowEvery},
      {"sparsity.min_shadow_every", "Sparsity", "smallest such number but 0 that a request may name",
       &s.min_shadow_every, 1, kMaxShadowEvery},
      {"sparsity.fallback", "Sparsity", "let a layer whose comparisons fail run exact until they pass again",
       &e.shadow_fallback},

      {"transport.max_message_bytes", "Transport", "most bytes of one request", &s.max_message_bytes, 1024, kGib},
      {"transport.max_outbox_bytes", "Transport",
       "bytes that a stream's client may leave unread before the stream ends", &s.max_outbox_bytes, 1024, kGib},
      {"transport.max_concurrent_streams", "Transport", "requests at once per connection; more wait in the client",
       &s.max_concurrent_streams, 1, 100000},
      {"transport.memory_mib", "Transport", "memory of gRPC in MiB, for all connections together", &s.max_transport_mib,
       16, 1 << 20},

      {"connection.max_age_s", "Transport",
       "seconds after which a connection is told to go, give or take a tenth, so that new replicas get calls; 0: never",
       &s.connection_max_age_s, 0, 1e6},
      {"connection.max_age_grace_s", "Transport", "seconds that requests on it may still take; 0: no limit",
       &s.connection_max_age_grace_s, 0, 1e6},

      {"tls.cert", "Security", "PEM file of the server's certificate and its chain; empty: plain text", &s.tls_cert},
      {"tls.key", "Security", "PEM file of the certificate's key", &s.tls_key},
      {"tls.client_ca", "Security",
       "PEM file of authorities; clients must show a certificate of theirs; empty: any may", &s.tls_client_ca},
      {"tls.reload_s", "Security", "seconds between two looks at these files and auth.tokens_file", &s.tls_reload_s,
       0.1, 86400},
      {"auth.tokens_file", "Security",
       "file of lines TENANT:SHA256 of the bearer tokens that callers must send; empty: everybody may call",
       &s.auth_tokens_file},
      {"auth.admin_tenant", "Security", "tenant whose tokens the operators' AdminService takes", &s.auth_admin_tenant},
      {"auth.allow_plaintext", "Security", "take tokens without TLS on an address that is not loopback",
       &s.auth_allow_plaintext},

      {"health.listen",
       "Security",
       "HOST:PORT of the health service alone, in plain text and without tokens, for probes; empty: none",
       &s.health_listen,
       0,
       0,
       {},
       CheckAddressIfAny},
      {"health.port_file", "Security", "file to write that port number to; empty: none", &s.health_port_file},

      {"metrics.listen", "Metrics", "HOST:PORT of Prometheus' /metrics and a status page, plain HTTP; empty: none",
       &s.metrics_listen},
      {"metrics.port_file", "Metrics", "file to write that port to; empty: none", &s.metrics_port_file},
      {"metrics.count", "Metrics", "count what the engine does; false only to see what that costs", &e.count_metrics},
      {"metrics.edges", "Metrics",
       "edges of histograms, such as inter_token_latency_seconds=0.001,0.01,0.1;batch_size=1,4,16", &e.metric_edges},
      {"metrics.per_layer", "Metrics", "two gauges for every layer", &s.metrics_per_layer},
      {"metrics.slo_ttft_ms", "Metrics", "requests whose first token takes longer miss their target; 0: no target",
       &e.slo_ttft_ms, 0, 1e9},
      {"metrics.slo_itl_ms", "Metrics", "the same of the mean time between two tokens; 0: no target", &e.slo_itl_ms, 0,
       1e9},

      {"admin.listen",
       "Operators",
       "HOST:PORT of the operators' AdminService, which without tokens whoever reaches it may use; empty: off",
       &s.admin_listen,
       0,
       0,
       {},
       CheckAddressIfAny},
      {"admin.port_file", "Operators", "file to write that port number to; empty: none", &s.admin_port_file},

      {"drain.timeout_s", "Stopping", "seconds after SIGTERM that running requests may still take", &s.drain_timeout_s,
       0, 86400},
      {"drain.linger_ms", "Stopping", "milliseconds after SIGTERM in which new requests are still taken",
       &s.drain_linger_ms, 0, 600000},
      {"drain.goaway_ms", "Stopping",
       "milliseconds after that in which connections still answer; then they are told to go, while what runs goes on; "
       "0: when all has ended",
       &s.drain_goaway_ms, 0, 86400000},
      {"drain.queue", "Stopping", "let requests that wait at SIGTERM run too; else they are refused", &s.drain_queue},

      {"log.termination_file", "Logs", "file that gets the reason when the daemon exits with a failure; empty: none",
       &s.log_termination_file},
      {"log.level",
       "Logs",
       "least severe message that is written",
       &s.log_level,
       0,
       0,
       {"trace", "debug", "info", "warn", "error"}},
      {"log.format", "Logs", "form of the lines on standard error", &s.log_format, 0, 0, {"text", "json"}},
      {"log.access", "Logs", "write a line about every request", &s.log_access},
      {"log.prompt_chars", "Logs", "characters of a prompt's text in that line; 0: never any", &s.log_prompt_chars, 0,
       100000},
      {"log.engine_every_s", "Logs", "seconds between two lines about the engine while it works; 0: none",
       &s.log_engine_every_s, 0, 86400},

      {"trace.otlp_endpoint",
       "Traces",
       "HOST:PORT of a collector that takes OTLP over plain gRPC; empty: no traces",
       &s.trace_otlp_endpoint,
       0,
       0,
       {},
       CheckAddressIfAny},
      {"trace.sample_ratio", "Traces",
       "share of the requests without a traceparent that are traced; those with one say it themselves",
       &s.trace_sample_ratio, 0, 1},
      {"trace.max_queue", "Traces", "spans that may wait for the collector; more are dropped", &s.trace_max_queue, 1,
       1000000},
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
  if (!option.is_text()) return absl::StrCat(NumberText(option.min), " to ", NumberText(option.max));
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
          const bool in_range = ParseNumber(text, &value) && value >= option.min && value <= option.max;
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
