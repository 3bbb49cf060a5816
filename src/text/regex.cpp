#define PCRE2_CODE_UNIT_WIDTH 8
#include "text/regex.h"

#include <pcre2.h>

#include "base/error.h"

namespace larosa {

struct Regex::Code {
  pcre2_code* code = nullptr;
  pcre2_match_context* context = nullptr;
  std::string source;
  ~Code() {
    pcre2_code_free(code);
    pcre2_match_context_free(context);
  }
};

Regex::Regex(const std::string& pattern, const std::string& source) {
  auto code = std::make_shared<Code>();
  code->source = source;
  int error = 0;
  PCRE2_SIZE place = 0;
  if (pattern.size() > 65536) fail(source, ": pattern is longer than 65536 bytes");
  code->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                             PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &place, nullptr);
  if (!code->code) {
    PCRE2_UCHAR text[256] = {};
    pcre2_get_error_message(error, text, sizeof(text));
    fail(source, ": pattern: ", reinterpret_cast<const char*>(text), " at byte ", place);
  }
  pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE);
  code->context = pcre2_match_context_create(nullptr);
  CHECK(code->context);
  pcre2_set_match_limit(code->context, 10'000'000);
  pcre2_set_depth_limit(code->context, 100'000);
  code_ = std::move(code);
}

void Regex::each_match(std::string_view text, const std::function<void(size_t, size_t)>& found) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free_8)> data(
      pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  for (size_t start = 0; start < text.size();) {
    int result =
        pcre2_match(code_->code, subject, text.size(), start, PCRE2_NO_UTF_CHECK, data.get(), code_->context);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) {
      result = pcre2_match(code_->code, subject, text.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                           data.get(), code_->context);
    }
    if (result == PCRE2_ERROR_NOMATCH) return;
    if (result < 0) fail(code_->source, ": pattern: needs too much effort on this text");
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(data.get());
    const size_t begin = range[0], end = range[1];
    if (end > begin && begin >= start) {
      found(begin, end);
      start = end;
    } else {
      // An empty match (or one moved by \K): go on behind the next character.
      for (++start; start < text.size() && (static_cast<unsigned char>(text[start]) & 0xc0) == 0x80;) ++start;
    }
  }
}

}  // namespace larosa
