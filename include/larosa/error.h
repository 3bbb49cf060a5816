// What larosa throws when the outside world is wrong: a file, a flag, a request.
#pragma once

#include <stdexcept>

namespace larosa {

/// `what()` is one line that names the file and the field.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace larosa
