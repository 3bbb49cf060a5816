// Task files are read line by line, each line named in messages.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "eval/tasks.h"
#include "io/json.h"

namespace larosa {

/// The lines of a text file as valid UTF-8, without line ends ("\n" or "\r\n") and without an empty last one.
std::vector<std::string> read_lines(const std::string& path);

/// An item of each of the first `limit` lines, which are JSON objects.
std::vector<Item> read_json_lines(const std::string& path, int64_t limit,
                                  const std::function<Item(const Fields& line)>& item);

/// A member that is a list of at least `least` strings, and one that indexes a list of `size`.
std::vector<std::string> get_texts(const Fields& line, const std::string& name, size_t least);
int64_t get_index(const Fields& line, const std::string& name, size_t size);

}  // namespace larosa
