// Whole files, and directories that one process at a time may work in.
#pragma once

#include <string>

namespace larosa {

/// The whole file (`-`: standard input). Throws Error naming the path.
std::string read_file(const std::string& path);

/// Writes `text` under a temporary name and renames it, so that `path` is whole or absent. Throws Error.
void write_file(const std::string& path, const std::string& text);

/// `path` without slashes at its end, for a file or directory that is to be made. Throws Error naming it when
/// something stands there already or the directory above it does not exist.
std::string vacant_path(const std::string& path);

/// Holds a directory for this process as long as it lives; goes with the directory when that is renamed.
class DirectoryLock {
 public:
  /// Throws Error when another process holds it ("is in use") or it cannot be opened.
  explicit DirectoryLock(const std::string& dir);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  int fd_;
};

}  // namespace larosa
