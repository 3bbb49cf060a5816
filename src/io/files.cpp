#include "io/files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "base/error.h"

namespace larosa {

namespace fs = std::filesystem;

std::string read_file(const std::string& path) {
  const bool standard = path == "-";
  std::error_code ignored;
  if (!standard && fs::is_directory(path, ignored)) fail(path, ": is a directory, expected a file");
  std::ifstream file;
  if (!standard) file.open(path, std::ios::binary);
  if (!file) fail(path, ": cannot be opened");
  std::istream& in = standard ? std::cin : file;
  std::string text;
  std::array<char, 1 << 16> part;
  while (in.read(part.data(), part.size()) || in.gcount() > 0)
    text.append(part.data(), static_cast<size_t>(in.gcount()));
  if (in.bad()) fail(path, ": cannot be read");
  return text;
}

void write_file(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".tmp";
  std::ofstream file(temporary, std::ios::binary);
  file << text;
  file.close();
  if (!file) fail(path, ": cannot be written");
  fs::rename(temporary, path);
}

std::string vacant_path(const std::string& path) {
  std::string dir = fs::path(path + "/").parent_path().string();
  const fs::path above = fs::path(dir).parent_path();
  std::error_code ignored;
  if (!above.empty() && !fs::is_directory(above, ignored))
    fail(dir, ": the directory ", above.string(), " does not exist");
  if (fs::symlink_status(dir, ignored).type() != fs::file_type::not_found)
    fail(dir, ": exists already; choose another name or remove it");
  return dir;
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
