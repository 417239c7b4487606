// The CPU update of many tensors, divided among threads.
#include "cpu/update.h"

#include <algorithm>  // max, min, none_of, upper_bound
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

// Calls f with the arrays of a tensor from element `begin` on.
template <class F>
void with_arrays(const TensorUpdate& item, const PackedRule& rule, int64_t begin, F&& f) {
  with_stored_type(item.dtype, [&](auto stored) {
    using P = decltype(stored);
    using S = P;  // item.state_dtype is another on GPUs only
    Arrays<P, S> arrays{static_cast<P*>(item.param) + begin, static_cast<const P*>(item.grad) + begin, {}, nullptr};
    for (int s = 0; s < rule.n_states; ++s) arrays.state[s] = static_cast<S*>(item.kept[s]) + begin;
    if (rule.tail_bytes > 0) {
      arrays.tail = static_cast<char*>(item.kept[rule.n_states + rule.n_scalars]) + begin * rule.tail_bytes;
    }
    f(arrays);
  });
}

void update_tensor(const TensorUpdate& item, const PackedRule* rules, int64_t begin, int64_t end) {
  const PackedRule& rule = rules[item.rule];
  with_arrays(item, rule, begin, [&]<class P, class S>(const Arrays<P, S>& arrays) {
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

// Updates all tensors, of which the rules know all that they need.
void sweep(const TensorUpdate* updates, int64_t n_updates, const PackedRule* rules, const Threads& threads) {
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

// --- Rules that need sums over their tensor first --------------------------------------------------------------------

// Elements that one thread sums: sums do not depend on the number of threads.
constexpr int64_t kSummedElements = 1 << 15;

void add_terms_of(const TensorUpdate& item, const PackedRule& rule, int64_t begin, int64_t end, double* sums) {
  with_arrays(item, rule, begin, [&]<class P, class S>(const Arrays<P, S>& arrays) {
    static const auto table = table_of_rules<compute_t<P>>([]<class Rule>() -> AddTerms<P, S> {
      if constexpr (kSumsOf<Rule> > 0) return add_terms<Rule, P, S>;
      return nullptr;
    });
    table[rule.id](arrays, rule.bytes, end - begin, sums);
  });
}

void take_sums(PackedRule& packed, DType dtype, const double* sums) {
  with_stored_type(dtype, [&](auto stored) {
    static const auto table =
        table_of_rules<compute_t<decltype(stored)>>([]<class Rule>() -> void (*)(PackedRule&, const double*) {
          if constexpr (kSumsOf<Rule> == 0) return nullptr;
          return [](PackedRule& packed, const double* sums) {
            if constexpr (kSumsOf<Rule> > 0) reinterpret_cast<Rule*>(packed.bytes)->take_sums(sums);
          };
        });
    table[packed.id](packed, sums);
  });
}

// A rule for each tensor, which knows the tensor's sums.
std::vector<PackedRule> rules_with_sums(const TensorUpdate* updates, int64_t n_updates, const PackedRule* rules,
                                        const Threads& threads) {
  struct Block {
    int64_t item, begin;
    double sums[kMaxSums];
  };
  std::vector<Block> blocks;
  std::vector<PackedRule> own;
  for (int64_t i = 0; i < n_updates; ++i) {
    own.push_back(rules[updates[i].rule]);
    for (int64_t begin = 0; own[i].n_sums > 0 && begin < updates[i].numel; begin += kSummedElements) {
      blocks.push_back({i, begin, {}});
    }
  }
  run_tasks(threads, static_cast<int64_t>(blocks.size()), [&](int64_t task) {
    Block& block = blocks[task];
    const TensorUpdate& item = updates[block.item];
    add_terms_of(item, own[block.item], block.begin, std::min(block.begin + kSummedElements, item.numel), block.sums);
  });
  for (size_t first = 0, end = 0; first < blocks.size(); first = end) {
    double sums[kMaxSums] = {};
    for (; end < blocks.size() && blocks[end].item == blocks[first].item; ++end) {
      for (int k = 0; k < kMaxSums; ++k) sums[k] += blocks[end].sums[k];
    }
    take_sums(own[blocks[first].item], updates[blocks[first].item].dtype, sums);
  }
  return own;
}

}  // namespace

void update(const TensorUpdate* updates, int64_t n_updates, const PackedRule* rules, int64_t n_rules,
            const Threads& threads) {
  if (std::none_of(rules, rules + n_rules, [](const PackedRule& rule) { return rule.n_sums > 0; })) {
    return sweep(updates, n_updates, rules, threads);
  }
  const auto own = rules_with_sums(updates, n_updates, rules, threads);
  std::vector<TensorUpdate> with_own(updates, updates + n_updates);
  for (int64_t i = 0; i < n_updates; ++i) with_own[i].rule = static_cast<int32_t>(i);
  sweep(with_own.data(), n_updates, own.data(), threads);
}

}  // namespace fastopt::cpu
