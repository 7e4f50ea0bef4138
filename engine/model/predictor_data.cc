#include "engine/model/predictor_data.h"

namespace dejavu {

absl::string_view Name(Tap tap) {
  switch (tap) {
    case Tap::kAttentionNorm:
      return "attention-norm";
    case Tap::kMlpNorm:
      return "mlp-norm";
    case Tap::kPreviousLayer:
      return "previous-layer";
  }
  return "unknown";
}

std::optional<Tap> ParseTap(absl::string_view name) {
  for (const Tap tap : {Tap::kAttentionNorm, Tap::kMlpNorm, Tap::kPreviousLayer}) {
    if (Name(tap) == name) return tap;
  }
  return std::nullopt;
}

}  // namespace dejavu
