#include "engine/request.h"

namespace dejavu {

absl::string_view Name(Urgency urgency) {
  switch (urgency) {
    case Urgency::kInteractive:
      return "interactive";
    case Urgency::kNormal:
      return "normal";
    case Urgency::kBatch:
      return "batch";
  }
  return "normal";
}

}  // namespace dejavu
