// Pattern: a regular expression of ours (PCRE2), anchored, over well-formed UTF-8. Immutable: any thread, with a
// Pattern::Scratch of its own.
#ifndef ENGINE_TEXT_PATTERN_H_
#define ENGINE_TEXT_PATTERN_H_

#include <cstddef>
#include <memory>

#include "absl/strings/string_view.h"

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;

namespace dejavu {

class Pattern {
 public:
  class Scratch {
   public:
    Scratch();

   private:
    friend class Pattern;
    struct Free {
      void operator()(pcre2_real_match_data_8* data) const;
    };
    std::unique_ptr<pcre2_real_match_data_8, Free> data_;
  };

  explicit Pattern(const char* pattern);

  // How many bytes of `text` from `begin` on match; 0 where nothing does.
  size_t Match(absl::string_view text, size_t begin, Scratch& scratch) const;

 private:
  struct Free {
    void operator()(pcre2_real_code_8* code) const;
  };
  std::unique_ptr<pcre2_real_code_8, Free> code_;
};

}  // namespace dejavu

#endif  // ENGINE_TEXT_PATTERN_H_
