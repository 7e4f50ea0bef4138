#include "tests/bench/launch_trace.h"

#include <utility>

#include "kernels/base/check.h"

namespace dejavu {
namespace {

constexpr int32_t kNoKernel = -1;

}  // namespace

LaunchTrace* LaunchTrace::current_ = nullptr;

LaunchTrace::LaunchTrace(const DejavuCudaModule* traced) : traced_(*traced), module_(*traced) {
  CHECK(current_ == nullptr) << "another trace";
  current_ = this;
  module_.open = Open;
  module_.launch = Launch;
  module_.gemm = Gemm;
  module_.begin_capture = BeginCapture;
  module_.end_capture = EndCapture;
  module_.replay = Replay;
  module_.free_graph = FreeGraph;
}

LaunchTrace::~LaunchTrace() { current_ = nullptr; }

std::vector<TracedLaunch> LaunchTrace::Of(absl::FunctionRef<void()> step) {
  step_.clear();
  tracing_ = true;
  step();
  tracing_ = false;
  return std::exchange(step_, {});
}

void LaunchTrace::Keep(TracedLaunch launch) {
  if (capturing_)
    capture_.push_back(std::move(launch));
  else if (tracing_)
    step_.push_back(std::move(launch));
}

int LaunchTrace::Open(int32_t device, DejavuCudaContext** context, DejavuCudaDevice* info) {
  const int result = current_->traced_.open(device, context, info);
  if (result != 0) return result;
  current_->context_ = *context;
  current_->device_ = *info;
  return 0;
}

int LaunchTrace::Launch(DejavuCudaContext* context, const DejavuCudaLaunch* launch) {
  const auto* params = static_cast<const char*>(launch->params);
  current_->Keep({.launch = *launch, .params = {params, params + launch->params_bytes}, .gemm = std::nullopt});
  return current_->traced_.launch(context, launch);
}

int LaunchTrace::Gemm(DejavuCudaContext* context, const DejavuCudaGemm* gemm) {
  TracedLaunch product;
  product.launch.kernel = kNoKernel;
  product.gemm = *gemm;
  current_->Keep(std::move(product));
  return current_->traced_.gemm(context, gemm);
}

int LaunchTrace::BeginCapture(DejavuCudaContext* context) {
  current_->capturing_ = true;
  current_->capture_.clear();
  return current_->traced_.begin_capture(context);
}

int LaunchTrace::EndCapture(DejavuCudaContext* context, DejavuCudaGraph** graph) {
  current_->capturing_ = false;
  const int result = current_->traced_.end_capture(context, graph);
  if (result == 0 && *graph != nullptr) current_->graphs_[*graph] = std::exchange(current_->capture_, {});
  return result;
}

int LaunchTrace::Replay(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  if (current_->tracing_) {
    const std::vector<TracedLaunch>& captured = current_->graphs_[graph];
    current_->step_.insert(current_->step_.end(), captured.begin(), captured.end());
  }
  return current_->traced_.replay(context, graph);
}

void LaunchTrace::FreeGraph(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  current_->graphs_.erase(graph);
  current_->traced_.free_graph(context, graph);
}

int Submit(const DejavuCudaModule& module, DejavuCudaContext* context, const TracedLaunch& traced) {
  if (traced.gemm.has_value()) return module.gemm(context, &*traced.gemm);
  DejavuCudaLaunch launch = traced.launch;
  launch.params = traced.params.data();
  return module.launch(context, &launch);
}

}  // namespace dejavu
