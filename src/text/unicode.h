// UTF-8 and normalisation forms.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace larosa {

/// Length of the UTF-8 character that starts at `text[i]`, or 0 where the bytes are no valid character.
size_t utf8_length(std::string_view text, size_t i);
/// Invalid bytes replaced by U+FFFD, one for each maximal invalid part (as Python's errors="replace").
std::string to_valid_utf8(std::string_view text);
/// Bytes at the end of `text` that may be the start of a character still to come (0 to 3).
size_t incomplete_tail(std::string_view text);
void append_utf8(std::string& text, uint32_t code_point);
uint32_t code_point_at(std::string_view text, size_t i, size_t length);

/// The character at the start or end of `text` (valid UTF-8), 0 where there is none.
uint32_t first_character(std::string_view text);
uint32_t last_character(std::string_view text);
/// Unicode's White_Space, and what `\w` of Unicode's regular expressions matches.
bool is_space(uint32_t code_point);
bool is_word(uint32_t code_point);
/// `text` (valid UTF-8) without the white space at its start or end.
std::string_view stripped_left(std::string_view text);
std::string_view stripped_right(std::string_view text);

enum class NormalForm { nfc, nfd, nfkc, nfkd };
/// `text` (valid UTF-8) in a Unicode normalisation form.
std::string normalized(const std::string& text, NormalForm form);
/// Lower case by Unicode's simple mapping, character by character.
std::string lowered(const std::string& text);

}  // namespace larosa
