#include "torch/optim/update_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>  // clamp

namespace fastopt {
namespace {

// Blocks that each multiprocessor gets, where there is work enough: some more than run at a time, so that the last ones
// end together.
constexpr int64_t kBlocksPerMultiprocessor = 16;
constexpr int64_t kMaxChunk = 16 * cuda::kChunkUnit;

bool is_aligned(const TensorUpdate& item, int n_states) {
  uintptr_t all = reinterpret_cast<uintptr_t>(item.param) | reinterpret_cast<uintptr_t>(item.grad);
  for (int s = 0; s < n_states; ++s) all |= reinterpret_cast<uintptr_t>(item.kept[s]);
  return all % 16 == 0;
}

cuda::UpdateEntry entry_of(const TensorUpdate& item, int8_t rule, int n_states) {
  cuda::UpdateEntry entry{};
  entry.param = item.param;
  entry.grad = const_cast<void*>(item.grad);  // written only if the gradients are unscaled
  for (int k = 0; k < kMaxKept; ++k) entry.kept[k] = item.kept[k];
  entry.numel = item.numel;
  entry.rule = rule;
  entry.is_aligned = is_aligned(item, n_states);
  entry.has_scalars_on_device = item.has_scalars_on_device;
  entry.double_scalars = item.double_scalars;
  return entry;
}

bool share_launch(const TensorUpdate& a, const TensorUpdate& b, const std::vector<PackedRule>& rules) {
  return a.dtype == b.dtype && a.state_dtype == b.state_dtype && rules[a.rule].id == rules[b.rule].id;
}

}  // namespace

void CudaUpdater::run(const std::vector<const TensorUpdate*>& updates, const std::vector<PackedRule>& rules,
                      const Scaling& scaling, c10::Device where) {
  const CudaDevice device(where);
  n_uploaded_ = 0;
  std::vector<bool> is_done(updates.size());
  std::vector<cuda::UpdateEntry> entries;
  std::vector<PackedRule> used;
  std::vector<int32_t> used_as(rules.size());
  for (size_t first = 0; first < updates.size(); ++first) {
    if (is_done[first]) continue;
    // All that one launch can take: the same kernel, and no more rules than its arguments hold.
    entries.clear();
    used.clear();
    used_as.assign(rules.size(), -1);
    for (size_t i = first; i < updates.size(); ++i) {
      if (is_done[i] || !share_launch(*updates[first], *updates[i], rules)) continue;
      int32_t& rule = used_as[updates[i]->rule];
      if (rule < 0) {
        if (used.size() == cuda::kMaxRules) continue;
        rule = static_cast<int32_t>(used.size());
        used.push_back(rules[updates[i]->rule]);
      }
      entries.push_back(entry_of(*updates[i], static_cast<int8_t>(rule), used[rule].n_states));
      is_done[i] = true;
    }
    cuda::Update update{};
    update.rule = used[0].id;
    update.param_dtype = updates[first]->dtype;
    update.state_dtype = updates[first]->state_dtype;
    update.grad_scale = scaling.grad_scale;
    update.found_inf = scaling.found_inf;
    launch(entries, used, update, device, where);
  }
}

void CudaUpdater::launch(std::vector<cuda::UpdateEntry>& entries, const std::vector<PackedRule>& rules,
                         cuda::Update update, const CudaDevice& device, c10::Device where) {
  int64_t numel = 0;
  bool advances_scalars = false;
  for (const cuda::UpdateEntry& entry : entries) {
    numel += entry.numel;
    advances_scalars |= entry.has_scalars_on_device;
  }
  const int64_t wanted = numel / (device.multiprocessors() * kBlocksPerMultiprocessor);
  const int64_t chunk = std::clamp(divide_up(wanted, cuda::kChunkUnit) * cuda::kChunkUnit,
                                   static_cast<int64_t>(cuda::kChunkUnit), kMaxChunk);
  update.chunk = static_cast<int32_t>(chunk);
  update.rules = rules.data();
  update.n_rules = static_cast<int32_t>(rules.size());

  // A captured launch is replayed with the arguments it was captured with, so a graph keeps its tables in them.
  const bool is_capturing = device.is_capturing();
  at::Tensor ticket = ticket_;
  if (advances_scalars && !ticket.defined()) {
    ticket = at::zeros({1}, at::TensorOptions(where).dtype(at::kInt));
    if (!is_capturing) ticket_ = ticket;
  }
  if (advances_scalars) update.ticket = static_cast<uint32_t*>(ticket.mutable_data_ptr());
  const size_t per_launch = is_capturing || entries.size() <= cuda::kManyEntries ? cuda::kManyEntries : entries.size();
  for (size_t begin = 0; begin < entries.size(); begin += per_launch) {
    const size_t end = std::min(begin + per_launch, entries.size());
    int64_t n_chunks = 0;
    for (size_t i = begin; i < end; ++i) {
      entries[i].first_chunk = static_cast<int32_t>(n_chunks);
      n_chunks += divide_up(entries[i].numel, chunk);
    }
    TORCH_CHECK(n_chunks <= INT32_MAX, "fastopt: an update of ", numel, " elements on ", where,
                " is more than one launch can take");
    update.n_chunks = static_cast<int32_t>(n_chunks);
    at::Tensor sums;
    if (rules[0].n_sums > 0) {
      sums = at::empty({n_chunks * rules[0].n_sums}, at::TensorOptions(where).dtype(at::kDouble));
      update.sums = sums.mutable_data_ptr<double>();
    }
    update.n_entries = static_cast<int32_t>(end - begin);
    update.is_on_device = update.n_entries > cuda::kManyEntries;
    update.entries = update.is_on_device ? upload(entries, where) : &entries[begin];
    check_cuda(cuda_library().update(update, device.stream()),
               c10::str("updating ", entries.size(), " tensors of ", numel, " elements"), where);
  }
}

// A table in device memory, copied there only when it has changed since the last step.
const cuda::UpdateEntry* CudaUpdater::upload(const std::vector<cuda::UpdateEntry>& entries, c10::Device device) {
  if (tables_.size() <= n_uploaded_) tables_.emplace_back();
  Table& table = tables_[n_uploaded_++];
  const size_t bytes = entries.size() * sizeof(cuda::UpdateEntry);
  if (table.entries.size() != entries.size() || memcmp(table.entries.data(), entries.data(), bytes) != 0) {
    // Pinned, so that the copy waits for nothing; torch keeps both buffers until the stream is done with them.
    auto options = at::TensorOptions().dtype(at::kByte);
    const at::Tensor staged =
        at::empty({static_cast<int64_t>(bytes)}, device.is_cuda() ? options.pinned_memory(true) : options);
    memcpy(staged.mutable_data_ptr(), entries.data(), bytes);
    table.on_device = staged.to(device, at::kByte, /*non_blocking=*/true, /*copy=*/true);
    table.entries = entries;
  }
  return static_cast<const cuda::UpdateEntry*>(table.on_device.const_data_ptr());
}

}  // namespace fastopt
