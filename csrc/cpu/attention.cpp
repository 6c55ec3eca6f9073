// Divides attention on the CPU into tasks, runs them on threads, and sums what they leave to be summed.
//
// What a task computes does not depend on the number of threads, nor does the order of any sum: results are the same
// bits for any number.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#if !defined(TLALIGN_LIBGOMP)
#include <system_error>
#include <thread>
#include <vector>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "cpu_features.h"
#include "kernels.h"

#if defined(TLALIGN_LIBGOMP)
// What gcc makes of `#pragma omp parallel`. Called by its name so that clang, whose pragma brings a runtime of its own
// along, takes the threads that torch has too: two pools in one process spin against each other.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
#endif

namespace tlalign::cpu {

#define TLALIGN_DECLARE(name) extern const Kernels kernels_##name;
TLALIGN_CPU_ISAS(TLALIGN_DECLARE)
#undef TLALIGN_DECLARE

namespace {

// Instruction sets

bool usable_portable(const CpuFeatures&) { return true; }
[[maybe_unused]] bool usable_avx2(const CpuFeatures& f) { return f.avx2 && f.fma && f.f16c; }
[[maybe_unused]] bool usable_avx512(const CpuFeatures& f) {
  return usable_avx2(f) && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl;
}
[[maybe_unused]] bool usable_avx512bf16(const CpuFeatures& f) { return usable_avx512(f) && f.avx512_bf16; }

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*usable)(const CpuFeatures&);
};

// The best one first.
const InstructionSet INSTRUCTION_SETS[] = {
#define TLALIGN_LIST(name) {#name, &kernels_##name, &usable_##name},
    TLALIGN_CPU_ISAS(TLALIGN_LIST)
#undef TLALIGN_LIST
};

const InstructionSet& choose(const std::string& wanted) {
  std::string names;
  for (const InstructionSet& set : INSTRUCTION_SETS) {
    const bool usable = set.usable(cpu_features());
    if (wanted == set.name && !usable)
      throw std::invalid_argument("TLALIGN_CPU_ISA: this processor lacks instructions of " + wanted);
    if (wanted == set.name || (wanted.empty() && usable)) return set;
    names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument("TLALIGN_CPU_ISA: expected one of " + names + ", got " + wanted);
}

const Kernels& kernels_for(DType dtype, const std::string& isa) {
  const InstructionSet* set = &choose(isa);
  while (set->kernels->only_bfloat16 && dtype != DType::bfloat16) ++set;
  return *set->kernels;
}

// Threads

// An OpenMP runtime does not survive a fork: a child that asks it for threads waits forever. Children get one.
bool is_forked_child() {
#if defined(__unix__) || defined(__APPLE__)
  static const pid_t loader = getpid();
  return getpid() != loader;
#else
  return false;
#endif
}
[[maybe_unused]] const bool loader_is_known = is_forked_child();  // asked at load time, so that the loader is recorded

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate(int64_t floats) {
  return Floats(
      static_cast<float*>(::operator new[](static_cast<size_t>(floats) * sizeof(float), std::align_val_t(64))));
}

// Calls `work` on at most `threads` threads, of which the caller is one.
template <class Work>
void on_threads(int threads, Work work) {
#if defined(TLALIGN_LIBGOMP)
  GOMP_parallel([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(threads), 0);
#else
  std::vector<std::thread> others;
  try {
    while (static_cast<int>(others.size()) < threads - 1) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system has no more of them: those that there are do the work.
  }
  work();
  for (std::thread& other : others) other.join();
#endif
}

// Calls work(task, scratch) for tasks 0 to count - 1, in order of their numbers if there is one thread.
template <class Work>
void run(int64_t count, int threads, int64_t scratch_floats, Work work) {
  if (is_forked_child()) threads = 1;
  if (threads > count) threads = static_cast<int>(count);
  const int64_t scratch_row = (scratch_floats + 15) / 16 * 16;
  const Floats scratch = allocate(threads * scratch_row + 1);
  if (threads <= 1) {
    for (int64_t task = 0; task < count; ++task) work(task, scratch.get());
    return;
  }
  std::atomic<int64_t> next_task{0}, next_scratch{0};
  // All threads round, and take denormal numbers (torch.set_flush_denormal), as the caller does: which of them does a
  // task is chance.
  std::fenv_t of_caller;
  std::fegetenv(&of_caller);
  on_threads(threads, [&] {
    std::fenv_t before;
    std::fegetenv(&before);
    std::fesetenv(&of_caller);
    float* own = scratch.get() + next_scratch.fetch_add(1, std::memory_order_relaxed) * scratch_row;
    for (int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < count;) work(task, own);
    std::fesetenv(&before);
  });
}

// Tasks

struct Parts {
  int64_t count, base, extra;
  Parts(int64_t total, int64_t parts) : count(parts), base(total / parts), extra(total % parts) {}
  int64_t begin(int64_t i) const { return i * base + std::min(i, extra); }
  int64_t size(int64_t i) const { return base + (i < extra); }
};

// How images, heads and chunks of queries are dealt out. Heads of an image lie beside one another in memory, so that
// one thread should have many of them. With a bias that images share, a task has one head of several images: the bias
// is transposed once for them and its gradient summed over them, in parts that follow from the shape alone.
class Tasks {
 public:
  Tasks(const Problem& p, bool shares_bias, int64_t bias_sum, int64_t chunks, int threads)
      : images_(p.batch, shares_bias ? image_parts(p, bias_sum) : p.batch),
        heads_(p.heads,
               shares_bias ? p.heads : std::clamp<int64_t>(PER_THREAD * threads / (p.batch * chunks), 1, p.heads)),
        chunks_(chunks),
        threads_(threads) {}

  int64_t count() const { return images_.count * heads_.count * chunks_; }
  int64_t image_parts() const { return images_.count; }
  int64_t image_part(int64_t task) const { return task / chunks_ / heads_.count; }

  Task operator[](int64_t task) const {
    const int64_t head = task / chunks_ % heads_.count, image = image_part(task), next = task + threads_;
    const bool ends = next >= count();
    return {heads_.begin(head),
            heads_.size(head),
            images_.begin(image),
            images_.size(image),
            task % chunks_,
            ends ? -1 : heads_.begin(next / chunks_ % heads_.count),
            ends ? -1 : images_.begin(image_part(next))};
  }

 private:
  static constexpr int64_t PER_THREAD = 4;  // tasks, so that threads end at about the same time

  static int64_t image_parts(const Problem& p, int64_t bias_sum) {
    constexpr int64_t TASKS = 96, MOST_SUMS = 1 << 23;  // floats
    const int64_t by_memory = bias_sum == 0 ? TASKS : MOST_SUMS / (bias_sum * p.heads);
    return std::clamp<int64_t>(std::min(TASKS / p.heads, by_memory), 1, p.batch);
  }

  Parts images_, heads_;
  int64_t chunks_, threads_;
};

}  // namespace

const char* instruction_set(const std::string& wanted) { return choose(wanted).name; }

void forward(const Forward& f, const std::string& isa, int threads) {
  const Kernels& kernels = kernels_for(f.dtype, isa);
  const bool dense = f.sources > MAX_FUSED_SOURCES, averages = f.sources > 0 && !dense;
  const Floats head_share = allocate(f.batch * f.heads * head_sums(f) * f.queries + 1);
  const Tasks tasks(f, f.bias.data != nullptr && f.bias.image == 0, 0, kernels.forward_chunks(f), threads);
  // Heads of an image, times chunks, that are still to be done: whoever does the last one averages its shares.
  const std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[f.batch]);
  for (int64_t image = 0; image < f.batch; ++image) left[image] = f.heads * kernels.forward_chunks(f);
  run(tasks.count(), threads, kernels.forward_scratch(f), [&](int64_t number, float* scratch) {
    const Task task = tasks[number];
    kernels.forward(f, task, head_share.get(), scratch);
    for (int64_t image = task.first_image; image < task.first_image + task.images; ++image)
      if (left[image].fetch_sub(task.heads) == task.heads && averages)
        kernels.average_heads(f, head_share.get(), image);
  });
  if (dense) {
    const int64_t label_chunks = kernels.dense_share_chunks(f);
    run(f.batch * label_chunks, threads, kernels.dense_share_scratch(f), [&](int64_t task, float* scratch) {
      kernels.dense_share(f, head_share.get(), task / label_chunks, task % label_chunks, scratch);
    });
  }
}

void backward(const Backward& b, const std::string& isa, int threads) {
  const Kernels& kernels = kernels_for(b.dtype, isa);
  const int64_t padded = padded_queries(b, kernels.lanes), bias_sum = b.keys * padded;
  const bool sums_bias = b.grad_bias != nullptr;
  const bool shares_bias = b.bias.data != nullptr && (sums_bias ? b.bias_images == 1 : b.bias.image == 0);
  const Tasks tasks(b, shares_bias, sums_bias ? bias_sum : 0, 1, threads);
  const int64_t padding_sum = b.grad_padding != nullptr ? b.heads * 3 * b.head_dim : 0;
  const Floats parts = allocate(sums_bias ? tasks.image_parts() * b.heads * bias_sum : 1);
  const Floats padding_parts = allocate(tasks.image_parts() * padding_sum + 1);
  run(tasks.count(), threads, kernels.backward_scratch(b), [&](int64_t task, float* scratch) {
    float* part = sums_bias ? parts.get() + tasks.image_part(task) * b.heads * bias_sum : nullptr;
    float* padding_part = padding_sum > 0 ? padding_parts.get() + tasks.image_part(task) * padding_sum : nullptr;
    kernels.backward(b, tasks[task], part, padding_part, scratch);
  });
  for (int64_t head = 0; padding_sum > 0 && head < b.heads; ++head)
    kernels.sum_grad_padding(b, padding_parts.get(), tasks.image_parts(), head);
  if (sums_bias) {
    const int64_t vectors = padded / kernels.lanes;
    run(b.bias_images * b.bias_heads * vectors, threads, 0, [&](int64_t task, float*) {
      const int64_t vector = task % vectors, head = task / vectors % b.bias_heads,
                    image = task / vectors / b.bias_heads;
      kernels.sum_grad_bias(b, parts.get(), tasks.image_parts(), image, head, vector * kernels.lanes);
    });
  }
}

}  // namespace tlalign::cpu
