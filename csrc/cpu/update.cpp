// The CPU update of many tensors, divided among threads.
#include "cpu/update.h"

#include <algorithm>  // max, min, upper_bound
#include <vector>

#include "cpu/update_loop.h"
#include "rules/rules.h"

namespace fastopt::cpu {
namespace {

// Elements below which another thread costs more than it saves: about 2 us of arithmetic.
constexpr int64_t kMinElementsPerThread = 8192;
// A tensor's fixed cost, in elements: finding it and starting its loop.
constexpr int64_t kTensorOverhead = 64;
// Elements up to which a thread keeps the same share each step, so that the caches keep the data; beyond, the threads
// take the next share when they are free.
constexpr int64_t kMaxElementsInCache = 1 << 24;
// How far ahead of the one that is updated a tensor is fetched, and how many bytes of each of its arrays.
constexpr int64_t kTensorsAhead = 4;
constexpr int64_t kFetchedBytes = 4 * kLineBytes;
// Divisions inside a tensor fall on whole cache lines of every stored type.
constexpr int64_t kAlignment = 64;

// The loop of a rule for parameters of type P and states of type S.
template <class P, class S>
Update<P, S> find_update(int32_t rule_id) {
  static const auto table =
      table_of_rules<compute_t<P>>([]<class Rule>() -> Update<P, S> { return update_function<Rule, P, S>(); });
  return table[rule_id];
}

void update_tensor(const TensorUpdate& item, const PackedRule* rules, int64_t begin, int64_t end) {
  const PackedRule& rule = rules[item.rule];
  with_stored_type(item.dtype, [&](auto stored) {
    using P = decltype(stored);
    using S = P;  // item.state_dtype is another on GPUs only
    Arrays<P, S> arrays{static_cast<P*>(item.param) + begin, static_cast<const P*>(item.grad) + begin, {}};
    for (int s = 0; s < rule.n_states; ++s) arrays.state[s] = static_cast<S*>(item.kept[s]) + begin;
    find_update<P, S>(rule.id)(arrays, rule.bytes, end - begin);
  });
}

// Prefetches the first lines of a tensor that comes soon: no address predicts the next.
void fetch_start(const TensorUpdate& item, const PackedRule* rules) {
  const int64_t n_bytes = std::min<int64_t>(item.numel * bytes_of(item.dtype), kFetchedBytes);
  fetch(item.param, n_bytes);
  fetch(item.grad, n_bytes);
  for (int s = 0; s < rules[item.rule].n_states; ++s) fetch(item.kept[s], n_bytes);
}

}  // namespace

void update(const TensorUpdate* updates, int64_t n_updates, const PackedRule* rules, const Threads& threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < n_updates; ++i) total += updates[i].numel + kTensorOverhead;
  const int64_t n_threads = std::min<int64_t>(threads.count, total / kMinElementsPerThread);
  if (n_threads <= 1) {
    for (int64_t i = 0; i < n_updates; ++i) {
      if (i + kTensorsAhead < n_updates) fetch_start(updates[i + kTensorsAhead], rules);
      update_tensor(updates[i], rules, 0, updates[i].numel);
    }
    return;
  }

  // All tensors laid end to end: item i begins at starts[i]. Each task takes one share of that line.
  thread_local std::vector<int64_t> starts;
  starts.clear();
  int64_t start = 0;
  for (int64_t i = 0; i < n_updates; ++i) {
    starts.push_back(start);
    start += updates[i].numel + kTensorOverhead;
  }
  const int64_t n_tasks = total <= kMaxElementsInCache ? n_threads : n_threads * 8;
  const int64_t share = divide_up(total, n_tasks);
  const int64_t* const starts_begin = starts.data();

  // A share that ends inside a tensor ends on a cache line; the next begins where it ended.
  const auto local_cut = [&](int64_t item, int64_t position) {
    const int64_t local = std::max<int64_t>(position - starts_begin[item], 0);
    return std::min(divide_up(local, kAlignment) * kAlignment, updates[item].numel);
  };
  run_tasks(threads, n_tasks, [&](int64_t task) {
    const int64_t begin = task * share;
    const int64_t end = std::min(begin + share, total);
    int64_t item = std::upper_bound(starts_begin, starts_begin + n_updates, begin) - starts_begin - 1;
    for (; item < n_updates && starts_begin[item] < end; ++item) {
      if (item + kTensorsAhead < n_updates) fetch_start(updates[item + kTensorsAhead], rules);
      const int64_t first = local_cut(item, begin);
      const int64_t last = local_cut(item, end);
      if (first < last) update_tensor(updates[item], rules, first, last);
    }
  });
}

}  // namespace fastopt::cpu
