// Error messages from their parts: Text("must be ", 3, ", got ", name).
#ifndef DIFFMIC_TEXT_H_
#define DIFFMIC_TEXT_H_

#include <sstream>
#include <string>

namespace diffmic {

template <typename... Parts>
std::string Text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace diffmic

#endif  // DIFFMIC_TEXT_H_
