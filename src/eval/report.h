// What a sweep has found, as one page that needs nothing else.
#pragma once

#include <string>

namespace larosa {

/// Writes `dir`/report.html and `dir`/plots/*.svg from results.csv, layers.csv (if there) and sweep.json of
/// `dir` alone; a sweep that is not complete yet gives what it has. Throws Error naming the file and what is
/// wrong with it.
void write_report(const std::string& dir);

}  // namespace larosa
