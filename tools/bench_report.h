// What `larosa bench` found, and the three formats in which it says so.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace larosa {

/// One operation's part of a row (`--ops`).
struct OperationRow {
  std::string name;
  int64_t calls = 0, bytes = 0;  // of one repetition
  std::vector<double> seconds;   // per repetition, all calls together
};

/// One line of the table: a reading of the model and a test, timed once per repetition.
struct Row {
  std::string backend;  // one line
  std::string method;
  bool dense = true;    // every channel, no adapter: what others are compared with
  double sparsity = 0;  // of the projections' weight bytes
  int threads = 1;
  int64_t depth = 0, tokens = 0;
  bool prompt = false;
  double bytes = 0, dense_bytes = 0;       // read per token, of the dense reading; 0 for prompts
  std::vector<double> seconds, bandwidth;  // per repetition; GB/s read beside it, same threads
  std::vector<OperationRow> operations;

  /// "tg16", "pp512 @ d1024".
  std::string test() const;
};

struct Report {
  std::string name;   // "llama 1.24B bf16"
  int64_t bytes = 0;  // of the dense reading's tensors
  int64_t parameters = 0;
  bool operations = false;  // print every row's operations instead of the rows
  int64_t prompts = 0;      // repetition i read prompt i modulo this; 0: random tokens, no prompts
  std::vector<Row> rows;
};

/// "1.24B", "134.52M".
std::string short_count(int64_t n);

/// `format`: md, csv or json. JSON is a list of flat objects with plain numbers; csv the same without
/// samples.
void print(const Report& report, const std::string& format);

}  // namespace larosa
