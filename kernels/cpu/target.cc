#include "kernels/cpu/target.h"

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "hwy/highway.h"
#if HWY_ARCH_X86
#include <cpuid.h>
#endif

namespace dejavu::cpu {
namespace {

std::atomic<bool> vnni_is_allowed{true};
std::atomic<bool> is_limited{false};

#if HWY_ARCH_X86
// Clang 14's __builtin_cpu_supports does not know it. That the system keeps the registers, Highway's AVX2 says.
bool ProcessorHasAvxVnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & 1u << 4) != 0;
}
#endif

bool ProcessorHasVnni(int64_t target) {
#if HWY_ARCH_X86
  if (target == HWY_AVX3) return __builtin_cpu_supports("avx512vnni") != 0;
  if (target == HWY_AVX2) return ProcessorHasAvxVnni();
#else
  (void)target;
#endif
  return false;
}

// Highway's AVX3 is what everybody else calls AVX-512: F, BW, CD, DQ and VL.
std::string Name(int64_t target, bool vnni) {
  return absl::StrCat(target == HWY_AVX3 ? "avx512" : absl::AsciiStrToLower(hwy::TargetName(target)),
                      vnni ? "-vnni" : "");
}

// Best first.
std::vector<std::string> Names() {
  std::vector<std::string> names;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (ProcessorHasVnni(target)) names.push_back(Name(target, true));
    names.push_back(Name(target, false));
  }
  return names;
}

}  // namespace

bool HasVnni(int64_t target) { return ProcessorHasVnni(target) && vnni_is_allowed.load(std::memory_order_relaxed); }

absl::Status LimitTarget(absl::string_view name) {
  int64_t better = 0;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    for (const bool vnni : {true, false}) {
      if (!absl::EqualsIgnoreCase(name, Name(target, vnni)) || (vnni && !ProcessorHasVnni(target))) continue;
      vnni_is_allowed = vnni;
      is_limited = true;
      hwy::DisableTargets(better);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      return absl::OkStatus();
    }
    better |= target;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "cpu_target is \"", name, "\"; what this processor has and this build knows: ", absl::StrJoin(Names(), ", ")));
}

void AllowVnni(bool allowed) { vnni_is_allowed = allowed; }

std::string TargetName() {
  const int64_t target = hwy::SupportedAndGeneratedTargets().front();
  return Name(target, HasVnni(target));
}

std::string DescribeTarget() {
  return absl::StrCat(TargetName(), is_limited ? ", as cpu_target asks, of " : ", the best of ",
                      absl::StrJoin(Names(), ", "));
}

}  // namespace dejavu::cpu
