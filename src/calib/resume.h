// What makes an interrupted run one that can be taken up again: the partial directory, which holds whole
// files alone, and in it job.json, everything that decides a byte of the output.
#pragma once

#include <optional>
#include <string>

#include "io/files.h"

namespace larosa {

struct SparsifyJob;

/// "<output>.partial", held by one process at a time; it becomes the output.
class PartialDirectory {
 public:
  /// Touches nothing yet. The job must outlive it.
  explicit PartialDirectory(const SparsifyJob& job) : job_(job) {}

  /// Makes the directory, or re-opens one that the same job has left (the plan must be outlined); so too the
  /// one for what the next sparsity can use (SparsifyOptions::kept). Throws Error when another job has left
  /// it, another process holds it, or the output exists.
  void open();

  /// After a failure: removes the directory unless something in it is worth a resume. True if it stays.
  bool abandon() const;

  /// Drops the working files and gives the directory its name. Throws Error when something stands there.
  void complete() const;

 private:
  const SparsifyJob& job_;
  std::optional<DirectoryLock> lock_;
  bool owned_ = false;  // it is locked and holds this job
};

}  // namespace larosa
