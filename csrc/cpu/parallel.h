// How kernels reach the caller's thread pool without knowing it.
#pragma once

#include <algorithm>  // max, min
#include <atomic>
#include <cstdint>
#include <vector>

namespace fastopt::cpu {

struct Threads {
  int count;  // threads that may run; 1 means: do not open a parallel region
  // Calls run(context, i) for each i in [0, n_threads), each on a thread of its own where it can, in any order, and
  // returns when all are done.
  void (*on_each)(int64_t n_threads, void (*run)(void* context, int64_t i), void* context);
};

// Divides [0, n_tasks) among threads. Each of them calls run(next), and next() for one task after the other until it
// gives n_tasks. A thread's share is as torch divides an array: side by side, thread after thread, so that it finds in
// its caches what it wrote there in another operation. It takes half of its share at once, then a sixteenth at a time,
// and when there is none left, what others have left of theirs.
template <class F>
void share_tasks(const Threads& threads, int64_t n_tasks, F&& run) {
  const int64_t n_threads = std::min<int64_t>(threads.count, n_tasks);
  if (n_threads <= 1) {
    run([task = int64_t{0}, n_tasks]() mutable { return task < n_tasks ? task++ : n_tasks; });
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> begin;  // of what nobody has taken
    int64_t end;
  };
  std::vector<Share> shares(n_threads);
  for (int64_t i = 0; i < n_threads; ++i) {
    shares[i].begin = i * n_tasks / n_threads;
    shares[i].end = (i + 1) * n_tasks / n_threads;
  }
  const int64_t n_first = std::max<int64_t>(n_tasks / n_threads / 2, 1);
  const int64_t n_more = std::max<int64_t>(n_tasks / n_threads / 16, 1);
  auto on_thread = [&](int64_t thread) {
    int64_t task = 0, end = 0, n = n_first, n_emptied = 0;
    run([&, n_tasks]() {
      while (task == end) {
        if (n_emptied == n_threads) return n_tasks;
        Share& share = shares[(thread + n_emptied) % n_threads];
        task = std::min(share.begin.fetch_add(n), share.end);
        end = std::min(task + n, share.end);
        n = n_more;
        n_emptied += task == end;
      }
      return task++;
    });
  };
  threads.on_each(
      n_threads, [](void* context, int64_t i) { (*static_cast<decltype(on_thread)*>(context))(i); }, &on_thread);
}

// Runs f(i) for each i in [0, n_tasks).
template <class F>
void run_tasks(const Threads& threads, int64_t n_tasks, F&& f) {
  share_tasks(threads, n_tasks, [&](auto&& next) {
    for (int64_t task = next(); task < n_tasks; task = next()) f(task);
  });
}

}  // namespace fastopt::cpu
