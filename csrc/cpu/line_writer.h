// Streaming stores: whole cache lines are written past the caches. An array larger than the caches gains nothing from
// passing through them, and an ordinary store reads the line from memory first.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>  // _mm_stream_si128, _mm_sfence
#endif

#include "common.h"

namespace fastopt::cpu {

#if defined(__SSE2__)
constexpr bool kCanStream = true;
FASTOPT_HD void stream_line(const void* from, void* to) {
  for (int64_t i = 0; i < kLineBytes / 16; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
  }
}
// Must be called before other threads may read lines that this one has streamed.
inline void end_streaming() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
FASTOPT_HD void stream_line(const void* from, void* to) { memcpy(to, from, kLineBytes); }
inline void end_streaming() {}
#endif

// Writes numbers to consecutive memory. If it streams, they come in groups of kGroup, of which the last may be shorter,
// and whole lines are streamed; incomplete lines at both ends, which hold other data too, are written by ordinary
// stores.
template <class G, int64_t kGroup>
class LineWriter {
  static constexpr int64_t kPerLine = kLineBytes / static_cast<int64_t>(sizeof(G));
  static_assert(kGroup % kPerLine == 0, "a group is whole lines, so that each lies in them as the first does");

 public:
  FASTOPT_HD void begin(G* to, bool streams) {
    to_ = to;
    streams_ = streams;
    shift_ = streams ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLineBytes / sizeof(G)) : 0;
  }
  FASTOPT_HD bool streams() const { return streams_; }
  // Where the caller puts the group that begins with number i.
  FASTOPT_HD G* space(int64_t i) { return streams_ ? group_ : to_ + i; }
  // Writes the n numbers that were put into space(i).
  FASTOPT_HD void write(int64_t i, int64_t n) {
    if (!streams_) return;
    const G* from = group_ - shift_;
    G* to = to_ + i - shift_;
    const int64_t n_foreign = i == 0 ? shift_ : 0;
    if (n < kGroup) {
      copy(from, to, n_foreign, shift_ + n);
      shift_ = 0;  // no incomplete line is left
      return;
    }
    if (n_foreign > 0) {
      copy(from, to, n_foreign, kPerLine);
    } else {
      stream_line(from, to);
    }
    for (int64_t j = kPerLine; j < kGroup; j += kPerLine) stream_line(from + j, to + j);
    // The line that this group only begins.
    if (shift_ > 0) memcpy(static_cast<void*>(group_ - kPerLine), group_ + kGroup - kPerLine, kLineBytes);
  }
  // Must be called after all `n` numbers.
  FASTOPT_HD void end(int64_t n) {
    if (shift_ > 0) copy(group_ - shift_, to_ + n - shift_, 0, shift_);
  }

 private:
  // Not memcpy: a call would take the surrounding loop's registers.
  FASTOPT_HD static void copy(const G* from, G* to, int64_t begin, int64_t end) {
    for (int64_t line = 0; line < end; line += kPerLine) {
      for (int64_t j = line; j < line + kPerLine; ++j) {
        if (j >= begin && j < end) to[j] = from[j];
      }
    }
  }

  alignas(kLineBytes) G buffer_[kPerLine + kGroup];  // the last line of the group before, and a group
  G* const group_ = buffer_ + kPerLine;
  G* to_;
  int64_t shift_;  // numbers by which the groups lie behind the lines
  bool streams_;
};

}  // namespace fastopt::cpu
