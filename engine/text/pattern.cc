#include "engine/text/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <new>

#include "kernels/base/check.h"

namespace dejavu {

void Pattern::Free::operator()(pcre2_code* code) const { pcre2_code_free(code); }
void Pattern::Scratch::Free::operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }

Pattern::Scratch::Scratch() : data_(pcre2_match_data_create(1, nullptr)) {
  if (data_ == nullptr) throw std::bad_alloc();
}

Pattern::Pattern(const char* pattern) {
  int error;
  size_t offset;
  code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &error, &offset, nullptr));
  if (code_ == nullptr && error == PCRE2_ERROR_HEAP_FAILED) throw std::bad_alloc();
  CHECK(code_ != nullptr) << "pattern: error " << error << " at " << offset;
  // Where this fails (no executable memory), pcre2_match interprets: the same result, only later.
  pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
}

size_t Pattern::Match(absl::string_view text, size_t begin, Scratch& scratch) const {
  // Checking UTF-8 here would look at the whole text for every match.
  const int result = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), begin,
                                 PCRE2_NO_UTF_CHECK, scratch.data_.get(), nullptr);
  if (result == PCRE2_ERROR_NOMEMORY) throw std::bad_alloc();
  if (result == PCRE2_ERROR_NOMATCH) return 0;
  CHECK(result > 0) << "match: " << result << " at " << begin;
  return pcre2_get_ovector_pointer(scratch.data_.get())[1] - begin;
}

}  // namespace dejavu
