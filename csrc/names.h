// Numbers that are declared once, as fields, and known by their names as text too.
#pragma once

#include <algorithm>  // min
#include <string>
#include <string_view>
#include <vector>

namespace fastopt {

// The number of names in a list such as "lr, momentum".
constexpr int count_names(const char* names) {
  int n = *names != '\0';
  for (; *names; ++names) n += *names == ',';
  return n;
}

inline std::vector<std::string> split_names(std::string_view list) {
  std::vector<std::string> names;
  while (!list.empty()) {
    const size_t end = std::min(list.find(','), list.size());
    names.emplace_back(list.substr(0, end));
    list.remove_prefix(std::min(list.find_first_not_of(", ", end), list.size()));
  }
  return names;
}

}  // namespace fastopt

// Fields of type double: options, as the operator's schema names them.
#define FASTOPT_NUMBERS(...)                            \
  double __VA_ARGS__;                                   \
  static constexpr const char* kNumbers = #__VA_ARGS__; \
  static constexpr int kNumberCount = ::fastopt::count_names(#__VA_ARGS__);
