#include "torch/context.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>  // pthread_atfork
#endif

namespace fastopt {
namespace {

std::atomic<int64_t> n_forks{0};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { ++n_forks; });
#endif

}  // namespace

int64_t fork_count() { return n_forks.load(std::memory_order_relaxed); }

}  // namespace fastopt
