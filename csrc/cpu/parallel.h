// How kernels reach the caller's thread pool without knowing it.
#pragma once

#include <cstdint>

namespace fastopt::cpu {

struct Threads {
  int count;  // threads that may run; 1 means: do not open a parallel region
  // Calls task(context, i) for each i in [0, n_tasks), in any order, and returns when all are done.
  void (*parallel_for)(int64_t n_tasks, void (*task)(void* context, int64_t i), void* context);
};

// Runs f(i) for each i in [0, n_tasks), on the pool if there is more than one task and thread.
template <class F>
void run_tasks(const Threads& threads, int64_t n_tasks, F&& f) {
  if (threads.count <= 1 || n_tasks <= 1) {
    for (int64_t i = 0; i < n_tasks; ++i) f(i);
    return;
  }
  threads.parallel_for(n_tasks, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &f);
}

}  // namespace fastopt::cpu
