// How kernels reach the caller's thread pool without knowing it.
#pragma once

#include <algorithm>  // max, min
#include <atomic>
#include <cstdint>

namespace fastopt::cpu {

struct Threads {
  int count;  // threads that may run; 1 means: do not open a parallel region
  // Calls run(context, i) for each i in [0, n_threads), each on a thread of its own where it can, in any order, and
  // returns when all are done.
  void (*on_each)(int64_t n_threads, void (*run)(void* context, int64_t i), void* context);
};

// Divides [0, n_tasks) among threads. Each of them calls run(next), and next() for one task after the other until it
// gives n_tasks. Tasks side by side go to one thread where they can, for its caches and prefetchers: first half of its
// share, the same at each call, then a sixteenth of a share at a time, while there are any.
template <class F>
void share_tasks(const Threads& threads, int64_t n_tasks, F&& run) {
  const int64_t n_threads = std::min<int64_t>(threads.count, n_tasks);
  if (n_threads <= 1) {
    run([task = int64_t{0}, n_tasks]() mutable { return task < n_tasks ? task++ : n_tasks; });
    return;
  }
  const int64_t n_first = std::max<int64_t>(n_tasks / n_threads / 2, 1);
  const int64_t n_more = std::max<int64_t>(n_tasks / n_threads / 16, 1);
  std::atomic<int64_t> n_taken{n_first * n_threads};
  auto on_thread = [&](int64_t thread) {
    int64_t task = thread * n_first, end = task + n_first;
    run([&, n_tasks]() {
      if (task == end) {
        task = std::min(n_taken.fetch_add(n_more), n_tasks);
        end = std::min(task + n_more, n_tasks);
      }
      return task < end ? task++ : n_tasks;
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
