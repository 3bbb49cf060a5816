#include "io/files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>

#include "base/error.h"

namespace larosa {

std::string read_file(const std::string& path) {
  if (path == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  if (std::filesystem::is_directory(path)) fail(path, ": is a directory, expected a file");
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, ": cannot be opened");
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (file.bad() || (file.fail() && !file.eof())) fail(path, ": cannot be read");
  return text;
}

void write_file(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".tmp";
  std::ofstream file(temporary, std::ios::binary);
  file << text;
  file.close();
  if (!file) fail(path, ": cannot be written");
  std::filesystem::rename(temporary, path);
}

DirectoryLock::DirectoryLock(const std::string& dir)
    : fd_(open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (fd_ < 0) fail(dir, ": cannot be opened: ", std::strerror(errno));
  if (flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
  const int reason = errno;
  close(fd_);
  if (reason == EWOULDBLOCK) fail(dir, ": is in use by another process");
  fail(dir, ": cannot be locked: ", std::strerror(reason));
}

DirectoryLock::~DirectoryLock() {
  close(fd_);
}

}  // namespace larosa
