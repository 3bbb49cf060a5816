// Options and input that the commands share.

#include <nlohmann/json.hpp>

#include "command.h"

namespace larosa {

void MachineOptions::declare(CLI::App& app, std::vector<int>* sweep) {
  CLI::Option* option =
      sweep ? app.add_option("-t,--threads", *sweep, "Threads, several by commas (default: one per core)")
                  ->delimiter(',')
            : app.add_option("-t,--threads", threads, "Threads (default: one per available core)");
  option->check(CLI::Range(1, 1024));
  app.add_option("--device", device, "Where to compute: cpu, cuda or cuda:I (see `larosa devices`)")
      ->capture_default_str();
  app.add_option("--backend", backend,
                 "Backend: cpu, or ref (plain loops, slow, the meaning of every operation)")
      ->check(CLI::IsMember({"cpu", "ref"}))
      ->capture_default_str();
  app.add_option("--products", products, "Arithmetic of dense products over many rows")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  app.add_flag("--no-progress", no_progress, "No progress bar");
}

Machine make_machine(const MachineOptions& options) {
  Machine machine;
  machine.pool = std::make_unique<ThreadPool>(options.threads);
  machine.backend = make_backend(options.device, options.backend, options.products, *machine.pool);
  return machine;
}

std::string json_text(const nlohmann::ordered_json& json) {
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace larosa
