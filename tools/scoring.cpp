// How a text is scored: the flags of `perplexity` and `sweep`.
#include <algorithm>

#include "base/error.h"
#include "command.h"
#include "eval/perplexity.h"

namespace larosa {

void ScoringFlags::declare(CLI::App& app) {
  app.add_option("--protocol", protocol, "raw, larosa, hf or llama.cpp")->capture_default_str();
  app.add_option("-c,--ctx-size", context,
                 "Tokens per window (default: the protocol's, at most the model's context)");
  app.add_option("--stride", stride,
                 "Tokens from window to window (default: the window); overlaps are context only");
  app.add_option("--chunks", chunks, "Score only the first windows of a text")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
}

PerplexityOptions ScoringFlags::options(const Tokenizer& tokenizer, int64_t most) const {
  const Protocol& p = find_protocol(protocol);
  PerplexityOptions options;
  options.context = context != 0 ? context : std::min(p.context, most);
  if (options.context < 2 || options.context > most)
    fail("-c ", options.context, ": expected 2 to the model's context of ", most);
  if (stride < 0 || stride > options.context)
    fail("--stride ", stride, ": expected 1 to the window's ", options.context, " tokens");
  options.stride = stride;
  options.last_window = p.last_window;
  options.skipped_share = p.skipped_share;
  options.most_windows = chunks;
  if (p.window_bos && tokenizer.adds_special()) options.bos = tokenizer.bos();
  return options;
}

std::vector<int32_t> ScoringFlags::tokens(const Tokenizer& tokenizer, const std::string& text,
                                          const std::string& file, int64_t window) const {
  if (text.empty()) fail(file, ": is empty");
  const Protocol& p = find_protocol(protocol);
  auto tokens = protocol_tokens(p, tokenizer, text);
  const int64_t least = std::max<int64_t>(2, p.least_windows * window);
  if (static_cast<int64_t>(tokens.size()) < least)
    fail(file, ": ", tokens.size(), " tokens, protocol ", p.name, " needs ", least);
  return tokens;
}

}  // namespace larosa
