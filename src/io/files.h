// Whole files, and directories that one process at a time may work in.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace larosa {

/// The whole file (`-`: standard input). Throws Error naming the path.
std::string read_file(const std::string& path);

/// Writes `text` under a temporary name and renames it, so that `path` is whole or absent. Throws Error.
void write_file(const std::string& path, const std::string& text);

/// 16 hex digits that name these bytes (XXH3).
std::string fingerprint_of(std::string_view bytes);

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

/// A file of lines that grows as work is done, so that the work can be taken up again; one process at a time.
class Journal {
 public:
  /// Opens or makes `path`; a last line that was not finished is cut off. Throws Error when another process
  /// holds it ("is in use") or it cannot be opened.
  explicit Journal(const std::string& path);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  /// What stood there when it was opened.
  const std::vector<std::string>& lines() const { return lines_; }
  /// Adds a line (without a line end in it). Throws Error when it cannot be written.
  void append(std::string_view line);
  /// Removes the file: the work is done.
  void remove();

 private:
  std::string path_;
  int fd_;
  std::vector<std::string> lines_;
};

}  // namespace larosa
