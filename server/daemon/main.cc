// dejavud. The main thread starts the server, lets another thread load the model, and waits for signals.
// Exit codes: 0 stopped by a signal after draining (or while loading); 1 cannot start: configuration, model or port, or
// the plan does not fit; 2 usage; 3 the engine failed; 4 a second signal cut off requests that were still running.
// Under mpirun rank 0 does all that; the other processes follow its engine and end with it, by 0, 1 or 3.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "config/command_line.h"
#include "engine/engine.h"
#include "engine/plan.h"
#include "engine/text/tokenizer.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "kernels/base/end_output.h"
#include "kernels/base/exhaustion.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/target.h"
#include "server/observe/logging.h"
#include "server/server.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr int kEngineCheckMs = 500;
constexpr unsigned kEndS = 10;
constexpr size_t kMaxTerminationBytes = 4000;  // Kubernetes reads 4096

enum ExitCode { kDrained = 0, kCannotStart = 1, kEngineFailed = 3, kCutOff = 4 };

// Wakes the main thread from another one, in poll(). Made at start: later connections may have all descriptors.
class Event {
 public:
  Event() : fd_(eventfd(0, EFD_CLOEXEC)) {}
  ~Event() { close(fd_); }
  bool made() const { return fd_ >= 0; }
  void Set() { CHECK(eventfd_write(fd_, 1) == 0) << "eventfd_write"; }
  int fd() const { return fd_; }

 private:
  const int fd_;
};

struct EngineAndTokenizer {
  std::unique_ptr<Tokenizer> tokenizer;  // null: token ids only
  std::unique_ptr<Engine> engine;
};

// At most a line a second, so that small models load silently.
LoadProgress LogProgress(Server* server) {
  const auto start = std::chrono::steady_clock::now();
  return [server, start, last = start](int64_t done_bytes, int64_t total_bytes) mutable {
    if (done_bytes >= total_bytes) server->SetWarming();
    const auto now = std::chrono::steady_clock::now();
    if (now - last >= std::chrono::seconds(1)) {
      last = now;
      const double done_gb = static_cast<double>(done_bytes) / 1e9;
      spdlog::info("loading: {:.1f} of {:.1f} GB ({:.0f} %), {:.2f} GB/s", done_gb,
                   static_cast<double>(total_bytes) / 1e9, 100.0 * static_cast<double>(done_bytes) / total_bytes,
                   done_gb / Seconds(start, now));
    }
    return true;
  };
}

// nullptr with a word in the log where the model has none.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const EngineOptions& options) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(options.model);
  if (!absl::IsNotFound(tokenizer.status())) return tokenizer;
  spdlog::warn("{} holds no tokenizer: token ids only", options.model);
  return nullptr;
}

int32_t SampledVocab(const Tokenizer* tokenizer) { return tokenizer == nullptr ? 0 : tokenizer->vocab_size(); }

// Transformers loads a tokenizer that knows more tokens than the model, and fails when one of them comes. Here it is
// said at once; where each prompt would hold one, nothing can be served.
absl::Status CheckTokensOfModel(const Tokenizer& tokenizer, const EngineOptions& options, int32_t vocab) {
  for (const auto& around : {tokenizer.before_prompt(), tokenizer.behind_prompt()}) {
    for (const int32_t id : around) {
      if (id < vocab) continue;
      return absl::InvalidArgumentError(absl::StrCat(options.model, ": the tokenizer puts token id ", id,
                                                     " around each prompt; ids of the model are below ", vocab));
    }
  }
  if (tokenizer.vocab_size() <= vocab) return absl::OkStatus();
  constexpr int kNamed = 3;
  int others = -kNamed;
  std::string named;
  for (int32_t id = vocab; id < tokenizer.vocab_size(); ++id) {
    const absl::string_view piece = tokenizer.Piece(id);
    if (piece.empty() || ++others > 0) continue;
    absl::StrAppend(&named, named.empty() ? "" : ", ", absl::Utf8SafeCHexEscape(piece), " (", id, ")");
  }
  if (others > 0) absl::StrAppend(&named, " and ", others, " others");
  spdlog::warn(
      "{}: the tokenizer knows tokens that the model lacks, whose ids are below {}: {}; texts that hold one are "
      "refused",
      options.model, vocab, named);
  return absl::OkStatus();
}

absl::StatusOr<EngineAndTokenizer> LoadEngineAndTokenizer(const EngineOptions& options, Server* server) {
  EngineAndTokenizer loaded;
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = OrExhausted([&] { return LoadTokenizer(options); });
  if (absl::IsResourceExhausted(tokenizer.status())) {
    return absl::ResourceExhaustedError(absl::StrCat("tokenizer: ", tokenizer.status().message()));
  }
  RETURN_IF_ERROR(tokenizer.status());
  loaded.tokenizer = *std::move(tokenizer);
  ASSIGN_OR_RETURN(loaded.engine, OrExhausted([&] {
                     return Engine::Create(options, SampledVocab(loaded.tokenizer.get()), LogProgress(server));
                   }));
  if (loaded.tokenizer != nullptr) {
    for (const std::string& remark : loaded.tokenizer->remarks()) spdlog::warn("{}", remark);
    RETURN_IF_ERROR(CheckTokensOfModel(*loaded.tokenizer, options, loaded.engine->model().vocab));
  }
  return loaded;
}

void BlockSignals(const sigset_t& signals) {
  CHECK(pthread_sigmask(SIG_BLOCK, &signals, nullptr) == 0) << "pthread_sigmask";
}

// SIGTERM and SIGINT stop the daemon, SIGHUP has it read its credentials again.
sigset_t OurSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int number : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, number);
  return signals;
}

// A signal that means nothing here shall not end a daemon. What a profiler or the like has taken for itself stays so.
void IgnoreUnlessTaken(int number) {
  struct sigaction action = {};
  if (sigaction(number, nullptr, &action) != 0 || action.sa_handler != SIG_DFL) return;
  signal(number, SIG_IGN);
}

// SIGXFSZ comes where a log has reached the limit of files; what is written then fails, and that is told.
void IgnoreStraySignals() {
  for (const int number : {SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGPWR, SIGSTKFLT, SIGXFSZ}) {
    IgnoreUnlessTaken(number);
  }
  for (int number = SIGRTMIN; number <= SIGRTMAX; ++number) IgnoreUnlessTaken(number);
}

// Logs why the daemon is about to exit with a failure, and leaves it where an orchestrator looks for it.
void Fail(const ServerOptions& options, const std::string& reason) {
  spdlog::critical("{}", reason);
  if (options.log_termination_file.empty()) return;
  // O_NONBLOCK: nobody waits for a FIFO's reader.
  const int fd =
      open(options.log_termination_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK | O_CLOEXEC, 0666);
  const std::string text = absl::StrCat(reason.substr(0, kMaxTerminationBytes), "\n");
  const bool written = fd >= 0 && write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  if (!written) spdlog::error("cannot write log.termination_file {}", options.log_termination_file);
  if (fd >= 0) close(fd);
}

// A process of mpirun that is not rank 0. Once it is loaded signals are rank 0's affair: mpirun sends them to all, and
// who leaves before rank 0 has drained takes its model away. Credentials are rank 0's affair too.
int Follow(const Config& config) {
  const EngineOptions& options = config.engine;
  IgnoreUnlessTaken(SIGHUP);
  for (const int number : {SIGTERM, SIGINT}) signal(number, [](int) { _exit(kDrained); });
  const auto follow = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, LoadTokenizer(options));
    return FollowEngine(options, SampledVocab(tokenizer.get()), [] {
      for (const int number : {SIGTERM, SIGINT}) signal(number, SIG_IGN);
    });
  };
  const absl::Status status = follow();
  if (status.ok()) return kDrained;
  Fail(config.server, std::string(status.message()));
  if (!absl::IsAborted(status)) return kCannotStart;
  StopLogging();
  _exit(kEngineFailed);  // MPI cannot be ended without the others
}

// What is left is to take the server down, and gRPC 1.51 waits there for good for a thread that the system refused to
// start. A signal needs neither memory nor a thread.
int EndSoon(int exit_code) {
  static volatile sig_atomic_t code;
  code = exit_code;
  signal(SIGALRM, [](int) { _exit(code); });
  alarm(kEndS);
  return exit_code;
}

class Daemon {
 public:
  explicit Daemon(Config config) : config_(std::move(config)) {}
  int Run();

 private:
  // What poll() found. Without a timeout it waits for one of both.
  struct Woken {
    bool signal = false;  // to stop; others are dealt with there
    bool event = false;
  };
  Woken WaitFor(const Event& event, int timeout_ms, Server* server);

  int LoadAndServe(Server* server);
  std::optional<int> Load(Server* server);
  int Serve(Server* server);
  int Drain(Server* server);
  void EndIfFailed(Server* server);

  const Config config_;
  int signal_fd_ = -1;
  Event loaded_, drained_;    // from the start: later clients may have left no descriptor
  EngineAndTokenizer model_;  // outlives the server
};

int Daemon::Run() {
  // Before any thread exists: one that had them unblocked would die of the first signal.
  const sigset_t signals = OurSignals();
  BlockSignals(signals);
  signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC);
  if (signal_fd_ < 0 || !loaded_.made() || !drained_.made()) {
    Fail(config_.server, absl::StrCat("cannot start: no descriptor for signals: ", std::strerror(errno)));
    return kCannotStart;
  }

  absl::StatusOr<std::unique_ptr<Server>> server =
      Server::Start(config_.server, config_.engine, [] { kill(getpid(), SIGTERM); });
  if (!server.ok()) {
    Fail(config_.server, absl::StrCat("cannot start: ", server.status().message()));
    return kCannotStart;
  }
  spdlog::info("listening on {} (port {}), loading {}", config_.server.listen, (*server)->port(), config_.engine.model);
  if ((*server)->admin_port() != 0) {
    spdlog::info("operators are listened to on {} (port {})", config_.server.admin_listen, (*server)->admin_port());
  }
  return EndSoon(LoadAndServe(server->get()));
}

int Daemon::LoadAndServe(Server* server) {
  const std::optional<int> exit_code = Load(server);
  return exit_code.has_value() ? *exit_code : Serve(server);
}

Daemon::Woken Daemon::WaitFor(const Event& event, int timeout_ms, Server* server) {
  pollfd fds[] = {{signal_fd_, POLLIN, 0}, {event.fd(), POLLIN, 0}};
  const int ready = poll(fds, 2, timeout_ms);
  CHECK(ready >= 0 || errno == EINTR || errno == ENOMEM) << "poll";
  Woken woken;
  if (ready <= 0) return woken;
  woken.event = (fds[1].revents & POLLIN) != 0;
  signalfd_siginfo info;
  if ((fds[0].revents & POLLIN) == 0 || read(signal_fd_, &info, sizeof(info)) != sizeof(info)) return woken;
  woken.signal = info.ssi_signo != SIGHUP;
  if (!woken.signal) server->ReloadCredentials();
  return woken;
}

// Nothing: the server serves.
std::optional<int> Daemon::Load(Server* server) {
  absl::StatusOr<EngineAndTokenizer> loaded = absl::UnknownError("not loaded");
  const auto start = std::chrono::steady_clock::now();
  std::thread loader([&] {
    loaded = LoadEngineAndTokenizer(config_.engine, server);
    loaded_.Set();
  });
  Woken woken;
  while (!woken.event && !woken.signal) woken = WaitFor(loaded_, -1, server);
  if (woken.signal) {
    spdlog::info("stopped by a signal while loading");
    server->Stop();
    StopLogging();
    _exit(kDrained);  // the loader may be deep in a read; nothing of it is worth waiting for
  }
  loader.join();
  if (!loaded.ok()) {
    Fail(config_.server, absl::StrCat("cannot load the model: ", loaded.status().message()));
    return kCannotStart;
  }
  const absl::Status default_tier = loaded->engine->CheckTier(config_.server.default_tier);
  if (!default_tier.ok()) {
    Fail(config_.server, absl::StrCat("cannot serve sparsity.default_tier: ", default_tier.message()));
    return kCannotStart;
  }
  model_ = *std::move(loaded);
  ExitOnExhaustion("dejavud", kEngineFailed);
  if (!model_.engine->synthetic().empty()) spdlog::warn("SYNTHETIC model: {}", model_.engine->synthetic());
  server->SetReady(model_.engine.get(), model_.tokenizer.get());
  spdlog::info("serving \"{}\" on {} after {:.1f} s: {:.2f} GB of {} weights", server->model_name(),
               model_.engine->backend_description(), SecondsSince(start),
               static_cast<double>(model_.engine->weight_bytes()) / 1e9, model_.engine->weight_type());
  return std::nullopt;
}

int Daemon::Serve(Server* server) {
  while (!WaitFor(drained_, kEngineCheckMs, server).signal) EndIfFailed(server);
  return Drain(server);
}

void Daemon::EndIfFailed(Server* server) {
  const bool engine_failed = model_.engine->failed();
  if (!engine_failed && server->CheckPorts()) return;
  Fail(config_.server,
       engine_failed ? "the engine has failed; exiting" : "a port cannot be listened on any more; exiting");
  server->SetFailed();
  server->Stop();
  StopLogging();
  _exit(kEngineFailed);  // the engine thread may hang in a step: nothing of it can be joined
}

int Daemon::Drain(Server* server) {
  spdlog::info("draining for at most {} s; a second signal stops at once", config_.server.drain_timeout_s);
  bool complete = false;
  std::thread drainer([&] {
    complete = server->Drain();
    drained_.Set();
  });
  Woken woken;
  while (!woken.event && !woken.signal) {
    woken = WaitFor(drained_, kEngineCheckMs, server);
    EndIfFailed(server);
  }
  if (!woken.event) {
    const bool idle = server->idle();
    if (idle) {
      spdlog::warn("stopped by a second signal");
    } else {
      Fail(config_.server, "stopped by a second signal; running requests are cut off");
    }
    StopLogging();
    _exit(idle ? kDrained : kCutOff);
  }
  drainer.join();
  if (complete) {
    spdlog::info("drained");
  } else {
    spdlog::warn("the drain timeout has passed; what still ran was cut off");
  }
  return kDrained;
}

int PrintPlan(const Config& config, const PlanOptions& devices) {
  const absl::StatusOr<Plan> plan =
      MakePlan(config.engine, config.server.highest_tier, config.server.lowest_tier, devices);
  if (!plan.ok()) {
    std::fprintf(stderr, "dejavud: cannot plan: %s\n", std::string(plan.status().message()).c_str());
    return kCannotStart;
  }
  std::fputs(plan->text.c_str(), stdout);
  return plan->fits ? kDrained : kCannotStart;
}

}  // namespace
}  // namespace dejavu

int main(int argc, char** argv) {
  dejavu::ExitOnExhaustion("dejavud", dejavu::kCannotStart);
  const dejavu::ParsedCommandLine command_line = dejavu::ParseCommandLine(argc, argv);
  if (command_line.exit_code.has_value()) return dejavu::EndOutput("dejavud", *command_line.exit_code);
  if (command_line.describe_build) {
    std::printf("CPU kernels: %s\n", dejavu::cpu::DescribeTarget().c_str());
    return dejavu::EndOutput("dejavud", dejavu::kDrained);
  }
  if (command_line.plan.has_value()) {
    return dejavu::EndOutput("dejavud", dejavu::PrintPlan(command_line.config, *command_line.plan));
  }
  const dejavu::ServerOptions& server = command_line.config.server;
  dejavu::StartLogging(server.log_level,
                       server.log_format == "json" ? dejavu::LogFormat::kJson : dejavu::LogFormat::kText);
  dejavu::IgnoreStraySignals();
  const int exit_code = dejavu::FollowsAnEngine(command_line.config.engine) ? dejavu::Follow(command_line.config)
                                                                            : dejavu::Daemon(command_line.config).Run();
  dejavu::StopLogging();
  return exit_code;
}
