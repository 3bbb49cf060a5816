// larosa: one binary, one row per command.
#include <algorithm>
#include <array>
#include <cstdio>
#include <new>

#include "base/error.h"
#include "base/progress.h"
#include "command.h"
#include "version.h"

namespace larosa {
namespace {

struct Command {
  const char* name;
  const char* summary;
  const char* example;
  Setup setup;
};

constexpr std::array kCommands = {
    Command{"sparsify", "Make a model that reads only the weights that matter for each token",
            "larosa sparsify models/demo-7m -o demo-50 --sparsity 0.5 --calib text/demo.calib.txt",
            setup_sparsify},
    Command{"run", "Continue a text", "larosa run demo-50 -p \"It was a dark night\" -n 64", setup_run},
    Command{"perplexity", "Measure how well a model predicts a text",
            "larosa perplexity demo-50 -f text/demo.valid.txt --against models/demo-7m", setup_perplexity},
    Command{"eval", "Answer the questions of zero-shot tasks",
            "larosa eval demo-50 --tasks arc_easy,piqa --data tasks -o demo-50.json", setup_eval},
    Command{"sweep", "Compare methods over sparsities and texts, with a report",
            "larosa sweep models/demo-7m --methods larosa,topk --calib text/demo.calib.txt -f "
            "text/demo.valid.txt -o demo-sweep",
            setup_sweep},
    Command{"inspect", "Show what a model is and what a token costs", "larosa inspect demo-50",
            setup_inspect},
    Command{"bench", "Time a model, or any shape with random weights",
            "larosa bench --config config.json --random-weights --sparsity 0.25,0.5", setup_bench},
    Command{"devices", "Show what this machine offers", "larosa devices", setup_devices},
    Command{"completion", "Print a completion script for bash, zsh or fish",
            "source <(larosa completion bash)", setup_completion},
};

int main_checked(int argc, char** argv) {
  CLI::App app("Large language models that read only the weights that matter for each token");
  app.set_version_flag("--version", LAROSA_VERSION_TEXT);
  app.require_subcommand(1);
  int code = 0;
  for (const Command& command : kCommands) {
    CLI::App* sub = app.add_subcommand(command.name, command.summary);
    sub->footer(std::string("Example:\n  ") + command.example);
    const auto run = command.setup(*sub);
    sub->callback([run, &code] { code = run(); });
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {  // --help, --version
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    const auto used = app.get_subcommands();
    fail(e.what(), " (larosa ", used.empty() ? "" : used[0]->get_name() + " ", "--help)");
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) fail("standard output: cannot be written");
  return code;
}

/// One line, whatever the file or flag that it quotes holds.
void print_error(std::string message) {
  std::replace_if(
      message.begin(), message.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  std::fprintf(stderr, "error: %s\n", message.c_str());
}

}  // namespace
}  // namespace larosa

int main(int argc, char** argv) {
  try {
    return larosa::main_checked(argc, argv);
  } catch (const larosa::Interrupted&) {
    std::fprintf(stderr, "interrupted\n");
    return 130;
  } catch (const std::bad_alloc&) {
    larosa::print_error("out of memory");
  } catch (const std::exception& e) {
    larosa::print_error(e.what());
  }
  return 1;
}
