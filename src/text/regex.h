// A PCRE2 pattern with bounded effort.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace larosa {

class Regex {
 public:
  /// Throws Error naming `source` when the pattern does not compile.
  Regex(const std::string& pattern, const std::string& source);
  /// Calls found(begin, end) for every match from left to right; empty matches are skipped. Throws Error when
  /// the pattern needs more effort than allowed.
  void each_match(std::string_view text, const std::function<void(size_t begin, size_t end)>& found) const;

 private:
  struct Code;
  std::shared_ptr<const Code> code_;
};

}  // namespace larosa
