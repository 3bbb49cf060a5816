// larosa completion: scripts for shells, made from the declared commands and flags.
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "command.h"

namespace larosa {
namespace {

using Commands = std::vector<const CLI::App*>;

/// Inside single quotes.
std::string quoted(std::string text) {
  for (size_t i = text.find('\''); i != std::string::npos; i = text.find('\'', i + 4))
    text.replace(i, 1, "'\\''");
  return text;
}

template <class Body>
void each_flag(const CLI::App& command, const Body& body) {
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) body(name, option->get_description());
  }
}

void print_bash(const Commands& commands) {
  std::string names, cases;
  for (const CLI::App* command : commands) {
    std::string flags;
    each_flag(*command, [&](const std::string& name, const std::string&) { flags += " --" + name; });
    names += " " + command->get_name();
    cases += "    " + command->get_name() + ") words='" + flags + "' ;;\n";
  }
  std::printf(
      "_larosa() {\n  local words='%s' current=\"${COMP_WORDS[COMP_CWORD]}\"\n  case \"${COMP_WORDS[1]}\" "
      "in\n%s"
      "  esac\n  [[ $COMP_CWORD -gt 1 && $current != -* ]] && return\n"
      "  COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n}\ncomplete -o default -F _larosa larosa\n",
      names.c_str(), cases.c_str());
}

void print_zsh(const Commands& commands) {
  std::string names, cases;
  const auto described = [](const std::string& name, std::string text) {
    for (size_t i = text.find(':'); i != std::string::npos; i = text.find(':', i + 2))
      text.replace(i, 1, "\\:");
    return " '" + name + ":" + quoted(text) + "'";
  };
  for (const CLI::App* command : commands) {
    names += described(command->get_name(), command->get_description());
    cases += "    " + command->get_name() + ") items=(";
    each_flag(*command, [&](const std::string& name, const std::string& text) {
      cases += described("--" + name, text);
    });
    cases += ") ;;\n";
  }
  std::printf(
      "#compdef larosa\n_larosa() {\n  local -a items\n  if (( CURRENT == 2 )); "
      "then\n"
      "    items=(%s)\n    _describe command items\n    return\n  fi\n  case ${words[2]} in\n%s  esac\n"
      "  if [[ $PREFIX == -* ]]; then _describe flag items; else _files; fi\n}\ncompdef _larosa larosa\n",
      names.c_str(), cases.c_str());
}

void print_fish(const Commands& commands) {
  for (const CLI::App* command : commands) {
    const std::string name = command->get_name();
    std::printf("complete -c larosa -n __fish_use_subcommand -a %s -d '%s'\n", name.c_str(),
                quoted(command->get_description()).c_str());
    each_flag(*command, [&](const std::string& flag, const std::string& text) {
      std::printf("complete -c larosa -n '__fish_seen_subcommand_from %s' -l %s -d '%s'\n", name.c_str(),
                  flag.c_str(), quoted(text).c_str());
    });
  }
}

}  // namespace

std::function<int()> setup_completion(CLI::App& app) {
  auto shell = std::make_shared<std::string>("bash");
  app.add_option("shell", *shell, "Shell")
      ->check(CLI::IsMember({"bash", "zsh", "fish"}))
      ->capture_default_str();
  return [shell, &app] {
    const auto commands = app.get_parent()->get_subcommands([](const CLI::App*) { return true; });
    const Commands all(commands.begin(), commands.end());
    static const std::map<std::string, void (*)(const Commands&)> printers = {
        {"bash", print_bash}, {"zsh", print_zsh}, {"fish", print_fish}};
    printers.at (*shell)(all);
    return 0;
  };
}

}  // namespace larosa
