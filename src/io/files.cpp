#include "io/files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#include <xxhash.h>

#include <array>
#include <cerrno>
#include <cstdio>
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
  std::error_code error;
  fs::rename(temporary, path, error);
  if (!error) return;
  fs::remove(temporary);
  fail(path, ": cannot be written: ", error.message());
}

std::string fingerprint_of(std::string_view bytes) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(bytes.data(), bytes.size())));
  return text;
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

namespace {

/// Takes the lock of the open file or directory `path`, or closes it and throws.
int locked(int fd, const std::string& path) {
  if (fd < 0) fail(path, ": cannot be opened: ", std::strerror(errno));
  if (flock(fd, LOCK_EX | LOCK_NB) == 0) return fd;
  const int reason = errno;
  close(fd);
  if (reason == EWOULDBLOCK) fail(path, ": is in use by another process");
  fail(path, ": cannot be locked: ", std::strerror(reason));
}

}  // namespace

DirectoryLock::DirectoryLock(const std::string& dir)
    : fd_(locked(open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), dir)) {}

DirectoryLock::~DirectoryLock() {
  close(fd_);
}

Journal::Journal(const std::string& path)
    : path_(path), fd_(locked(open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666), path)) {
  const std::string text = read_file(path);
  size_t begin = 0;
  for (size_t end = 0; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1)
    lines_.emplace_back(text, begin, end - begin);
  if (begin < text.size() && ftruncate(fd_, static_cast<off_t>(begin)) != 0) {
    close(fd_);
    fail(path, ": cannot be written");
  }
}

Journal::~Journal() {
  close(fd_);
}

void Journal::append(std::string_view line) {
  const std::string text = std::string(line) + '\n';
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = write(fd_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail(path_, ": cannot be written: ", std::strerror(errno));
    done += static_cast<size_t>(n);
  }
}

void Journal::remove() {
  std::error_code ignored;
  fs::remove(path_, ignored);
}

}  // namespace larosa
