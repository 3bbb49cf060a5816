#include "text/unicode.h"

#include <utf8proc.h>

#include <cstdlib>
#include <memory>

#include "base/error.h"

namespace larosa {
namespace {

/// Bytes of the well-formed start of a character at i, and how many the whole one has (0: no character starts
/// so).
struct Scan {
  size_t good = 0, whole = 0;
};

Scan scan(std::string_view text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<uint8_t>(text[k]); };
  const uint8_t first = byte(i);
  if (first < 0x80) return {1, 1};
  const size_t whole = first >= 0xc2 && first <= 0xdf   ? 2
                       : first >= 0xe0 && first <= 0xef ? 3
                       : first >= 0xf0 && first <= 0xf4 ? 4
                                                        : 0;
  if (whole == 0) return {1, 0};
  size_t good = 1;
  for (; good < whole && i + good < text.size(); ++good) {
    uint8_t low = 0x80, high = 0xbf;
    if (good == 1 && first == 0xe0) low = 0xa0;
    if (good == 1 && first == 0xed) high = 0x9f;
    if (good == 1 && first == 0xf0) low = 0x90;
    if (good == 1 && first == 0xf4) high = 0x8f;
    if (byte(i + good) < low || byte(i + good) > high) return {good, 0};
  }
  return {good, whole};
}

}  // namespace

size_t utf8_length(std::string_view text, size_t i) {
  const Scan s = scan(text, i);
  return s.good == s.whole ? s.whole : 0;
}

std::string to_valid_utf8(std::string_view text) {
  std::string valid;
  valid.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const Scan s = scan(text, i);
    if (s.good == s.whole) {
      valid.append(text.substr(i, s.whole));
    } else {
      valid += "\xef\xbf\xbd";
    }
    i += s.good;
  }
  return valid;
}

size_t incomplete_tail(std::string_view text) {
  for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const Scan s = scan(text, text.size() - back);
    if (s.whole > back && s.good == back) return back;
  }
  return 0;
}

void append_utf8(std::string& text, uint32_t c) {
  utf8proc_uint8_t bytes[4];
  const auto count = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), bytes);
  text.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(count));
}

uint32_t code_point_at(std::string_view text, size_t i, size_t length) {
  utf8proc_int32_t c = 0;
  utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + i,
                   static_cast<utf8proc_ssize_t>(length), &c);
  return static_cast<uint32_t>(c);
}

uint32_t first_character(std::string_view text) {
  return text.empty() ? 0 : code_point_at(text, 0, utf8_length(text, 0));
}

uint32_t last_character(std::string_view text) {
  size_t i = text.size();
  while (i > 0 && (static_cast<uint8_t>(text[--i]) & 0xc0) == 0x80) continue;
  return first_character(text.substr(i));
}

bool is_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

bool is_word(uint32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:  // the joiners, and symbols that count as letters
      return c == 0x200c || c == 0x200d || (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
             (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
  }
}

std::string_view stripped_left(std::string_view text) {
  while (!text.empty() && is_space(first_character(text))) text.remove_prefix(utf8_length(text, 0));
  return text;
}

std::string_view stripped_right(std::string_view text) {
  while (!text.empty() && is_space(last_character(text))) {
    while ((static_cast<uint8_t>(text.back()) & 0xc0) == 0x80) text.remove_suffix(1);
    text.remove_suffix(1);
  }
  return text;
}

std::string normalized(const std::string& text, NormalForm form) {
  int options = UTF8PROC_STABLE;
  options |= form == NormalForm::nfc || form == NormalForm::nfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == NormalForm::nfkc || form == NormalForm::nfkd) options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* result = nullptr;
  const auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                 static_cast<utf8proc_ssize_t>(text.size()), &result,
                                 static_cast<utf8proc_option_t>(options));
  const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owner(result, std::free);
  if (size < 0) fail("text: cannot be normalised: ", utf8proc_errmsg(size));
  return {reinterpret_cast<const char*>(result), static_cast<size_t>(size)};
}

std::string lowered(const std::string& text) {
  std::string low;
  for (size_t i = 0, n = 0; i < text.size(); i += n) {
    n = utf8_length(text, i);
    CHECK(n > 0);
    append_utf8(low, static_cast<uint32_t>(
                         utf8proc_tolower(static_cast<utf8proc_int32_t>(code_point_at(text, i, n)))));
  }
  return low;
}

}  // namespace larosa
