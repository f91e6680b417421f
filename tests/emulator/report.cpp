// Faults in words: source lines of the kernel, block and thread.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>

#include "launch_state.h"

namespace diffmic::emulator {
namespace {

constexpr std::size_t kMostFaults = 20;

struct Line {
  std::string function, place;
};

// addr2line's two lines about an address of this module, asked once each.
const Line& LineOf(const void* address) {
  static std::map<const void*, Line> known;
  const auto found = known.find(address);
  if (found != known.end()) return found->second;
  Line& line = known[address];
  line.place = "an unknown place";
  line.function = "a kernel";
  Dl_info info;
  if (address == nullptr || dladdr(address, &info) == 0) return line;
  std::array<char, 1024> buffer{};
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(address) -
                                               static_cast<const char*>(info.dli_fbase));
  std::snprintf(buffer.data(), buffer.size(), "addr2line -f -C -e '%s' %#zx 2>/dev/null",
                info.dli_fname, offset);
  FILE* pipe = popen(buffer.data(), "r");
  if (pipe == nullptr) return line;
  const auto read = [&](std::string* to) {
    if (std::fgets(buffer.data(), buffer.size(), pipe) == nullptr) return;
    std::string text(buffer.data());
    while (!text.empty() && text.back() == '\n') text.pop_back();
    if (!text.empty() && text[0] != '?') *to = text;
  };
  read(&line.function);
  read(&line.place);
  pclose(pipe);
  line.place = line.place.substr(0, line.place.find(" (discriminator"));
  line.place = std::filesystem::path(line.place).filename().string();
  return line;
}

}  // namespace

// "diffmic::cuda::rois::(anonymous namespace)::Windows" becomes "Windows".
std::string NameOf(const void* function) {
  std::string name = LineOf(function).function;
  const std::string hidden = "(anonymous namespace)::";
  if (const auto at = name.rfind(hidden); at != std::string::npos) {
    name = name.substr(at + hidden.size());
  }
  return name.substr(0, name.find('('));
}

std::string PlaceOf(const void* address) {
  // A return address is behind the call, whose line is meant.
  return LineOf(static_cast<const char*>(address) - 1).place;
}

std::string InWords(const Thread& thread) {
  const auto triple = [](const unsigned (&index)[3]) {
    return "(" + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " +
           std::to_string(index[2]) + ")";
  };
  return "block " + triple(thread.block->index) + " thread " + triple(thread.index);
}

void Report(const char* kind, const void* place, const std::string& rest) {
  static std::set<std::pair<std::string, const void*>> told;
  static const Launch* told_of = nullptr;
  if (launch->faults.empty() || told_of != launch) told.clear();
  told_of = launch;
  if (!told.insert({kind, place}).second) return;
  if (launch->faults.size() >= kMostFaults) {
    ++launch->more_faults;
    return;
  }
  std::string text = kind;
  if (place != launch->kernel) text += " at " + PlaceOf(place);
  if (running != nullptr) text += ", " + InWords(*running);
  launch->faults.push_back(text + rest);
}

}  // namespace diffmic::emulator
