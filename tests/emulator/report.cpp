// Reports of faults, with the source line of the kernel, the block and the thread.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <vector>

#include "launch_state.h"

namespace diffmic::emulator {
namespace {

constexpr std::size_t kMostFaults = 20;

// Functions and lines of an address, the innermost inlined function first.
struct Frame {
  std::string function, file, line;
};

std::string Trimmed(const char* text) {
  std::string line(text);
  while (!line.empty() && line.back() == '\n') line.pop_back();
  return line.substr(0, line.find(" (discriminator"));
}

// The output of addr2line for an address of this module, cached.
const std::vector<Frame>& FramesOf(const void* address) {
  static std::map<const void*, std::vector<Frame>> known;
  const auto [found, is_new] = known.try_emplace(address);
  std::vector<Frame>& frames = found->second;
  Dl_info info;
  if (!is_new || address == nullptr || dladdr(address, &info) == 0) return frames;
  std::array<char, 4096> buffer{};
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(address) -
                                               static_cast<const char*>(info.dli_fbase));
  std::snprintf(buffer.data(), buffer.size(), "addr2line -i -f -C -e '%s' %#zx 2>/dev/null",
                info.dli_fname, offset);
  FILE* pipe = popen(buffer.data(), "r");
  if (pipe == nullptr) return frames;
  while (std::fgets(buffer.data(), buffer.size(), pipe) != nullptr) {
    Frame frame{Trimmed(buffer.data()), "", ""};
    if (std::fgets(buffer.data(), buffer.size(), pipe) == nullptr) break;
    const std::string place = Trimmed(buffer.data());
    const std::size_t colon = place.rfind(':');
    if (frame.function[0] == '?' || colon == std::string::npos) continue;
    frame.file = place.substr(0, colon);
    frame.line = place.substr(colon + 1);
    frames.push_back(frame);
  }
  pclose(pipe);
  return frames;
}

}  // namespace

// "void diffmic::cuda::rois::(anonymous namespace)::Windows<4>(float*)" becomes "Windows<4>".
std::string NameOf(const void* function) {
  const auto& frames = FramesOf(function);
  if (frames.empty()) return "a kernel";
  std::string name = frames.back().function;
  const std::string hidden = "(anonymous namespace)::";
  for (auto at = name.find(hidden); at != std::string::npos; at = name.find(hidden)) {
    name.erase(at, hidden.size());
  }
  std::size_t begin = 0;
  int depth = 0;
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (depth > 0) continue;
    if (name[i] == '(') return name.substr(begin, i - begin);
    if (name[i] == ':' || name[i] == ' ') begin = i + 1;
  }
  return name.substr(begin);
}

// The source line in the kernel, not in a function of include/ that is inlined there.
std::string PlaceOf(const void* address) {
  // A return address is after the call.
  const auto& frames = FramesOf(static_cast<const char*>(address) - 1);
  for (const Frame& frame : frames) {
    if (frame.file.find("emulator/include/") != std::string::npos) continue;
    return std::filesystem::path(frame.file).filename().string() + ":" + frame.line;
  }
  return "an unknown place";
}

std::string InWords(const Thread& thread) {
  const auto triple = [](const unsigned (&index)[3]) {
    return "(" + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " +
           std::to_string(index[2]) + ")";
  };
  return "block " + triple(thread.block->index) + " thread " + triple(thread.index);
}

namespace {
std::set<std::pair<std::string, const void*>> told;
const Launch* told_of = nullptr;
}  // namespace

bool IsNews(const char* kind, const void* place) {
  if (launch->faults.empty() || told_of != launch) told.clear();
  told_of = launch;
  return !told.contains({kind, place});
}

void Report(const char* kind, const void* place, const std::string& rest) {
  if (!IsNews(kind, place)) return;
  told.insert({kind, place});
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
