// An optimizer's names as Python strings: the keys of its param groups and of a parameter's state.
#pragma once

#include <vector>

#include "torch/optim/group_reader.h"
#include "update/optimizer.h"

namespace fastopt {

// Made with the interpreter lock.
struct OptimizerKeys {
  std::vector<PyObject*> numbers, flags;  // in a param group
  std::vector<PyObject*> states, scalars;

  explicit OptimizerKeys(const Optimizer& optimizer) {
    for (const NumberOption& number : optimizer.numbers) numbers.push_back(intern(number.group_key));
    for (const std::string& name : optimizer.flags) flags.push_back(intern(name));
    for (const std::string& name : optimizer.states) states.push_back(intern(name));
    for (const std::string& name : optimizer.scalars) scalars.push_back(intern(name));
  }

 private:
  static PyObject* intern(const std::string& name) { return PyUnicode_InternFromString(name.c_str()); }
};

// Reads the options of a group; false where a value is of a kind that only torch's own step understands.
inline bool read_options(const Optimizer& optimizer, const OptimizerKeys& keys, GroupReader& group,
                         OptionValues& options) {
  PyObject* const lr = interned("lr");
  for (int i = 0; i < static_cast<int>(keys.numbers.size()); ++i) {
    double& number = optimizer.number(options, i);
    const int place = optimizer.numbers[i].place;
    const bool is_read = keys.numbers[i] == lr ? group.lr(number)
                         : place < 0           ? group.number(keys.numbers[i], number)
                                               : group.number_of_pair(keys.numbers[i], place, number);
    if (!is_read) return false;
  }
  for (int i = 0; i < static_cast<int>(keys.flags.size()); ++i) {
    bool& flag = optimizer.flag(options, i);
    flag = false;
    if (i != optimizer.first_step_flag && !group.flag(keys.flags[i], flag)) return false;
  }
  return optimizer.is_in_domain(options);
}

}  // namespace fastopt
