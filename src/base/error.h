// The two kinds of failure. `Error`: the outside world is wrong (a file, a flag, a request): it carries one
// line for the user. CHECK: the program is wrong: it aborts.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "larosa/error.h"

namespace larosa {

/// Throws Error with the parts written one after another. Example: fail(path, ": rope_theta is ", value).
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

/// a * b and a + b for non-negative sizes read from outside; throws Error naming `what` on overflow or a
/// negative operand.
inline int64_t checked_mul(int64_t a, int64_t b, const std::string& what) {
  int64_t result = 0;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result)) fail(what, ": size overflows");
  return result;
}
inline int64_t checked_add(int64_t a, int64_t b, const std::string& what) {
  int64_t result = 0;
  if (a < 0 || b < 0 || __builtin_add_overflow(a, b, &result)) fail(what, ": size overflows");
  return result;
}

}  // namespace larosa

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (0)
