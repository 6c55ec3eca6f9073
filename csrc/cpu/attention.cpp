// Divides attention on the CPU into tasks, runs them on threads, and sums what they leave to be summed.
//
// What a task computes does not depend on the number of threads, nor does the order of any sum: results are the same
// bits for any number.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(TLALIGN_LIBGOMP)
#include <thread>
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

// Calls work(number) on `workers` of `threads` threads, or on fewer if the system has no more.
template <class Work>
void on_threads(int threads, int workers, Work work) {
  std::atomic<int> next{0};
  auto join = [&] {
    if (const int number = next.fetch_add(1, std::memory_order_relaxed); number < workers) work(number);
  };
#if defined(TLALIGN_LIBGOMP)
  // All of them, for which torch asks, too: asked for fewer than before libgomp ends threads, and then for more it has
  // to start others.
  GOMP_parallel([](void* data) { (*static_cast<decltype(join)*>(data))(); }, &join, static_cast<unsigned>(threads), 0);
#else
  static_cast<void>(threads);
  std::vector<std::thread> others;
  try {
    while (static_cast<int>(others.size()) < workers - 1) others.emplace_back(join);
  } catch (const std::exception&) {
    // The system has no more of them, or no memory: those that there are do the work.
  }
  join();
  for (std::thread& other : others) other.join();
#endif
}

// Calls work(task, scratch) for tasks 0 to count - 1, in order of their numbers if there is one thread.
template <class Work>
void run(int64_t count, int threads, int64_t scratch_floats, Work work) {
  if (is_forked_child()) threads = 1;
  const int workers = static_cast<int>(std::min<int64_t>(threads, count));
  const int64_t scratch_row = (scratch_floats + 15) / 16 * 16;
  const Floats scratch = allocate(workers * scratch_row + 1);
  if (workers <= 1) {
    for (int64_t task = 0; task < count; ++task) work(task, scratch.get());
    return;
  }
  std::atomic<int64_t> next_task{0};
  // All threads round, and take denormal numbers (torch.set_flush_denormal), as the caller does: which of them does a
  // task is chance.
  std::fenv_t of_caller;
  std::fegetenv(&of_caller);
  on_threads(threads, workers, [&](int worker) {
    std::fenv_t before;
    std::fegetenv(&before);
    std::fesetenv(&of_caller);
    float* own = scratch.get() + worker * scratch_row;
    for (int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < count;) work(task, own);
    std::fesetenv(&before);
  });
}

// One where there is so little to do that to wake the others, and to wait for them, took longer: a core may be busy
// with something else.
int threads_worth(const Problem& p, int threads) {
  constexpr int64_t LEAST = 1 << 18;  // multiplications by keys and labels, some five microseconds
  return p.batch * p.queries * p.keys * (p.heads * p.head_dim + p.sources) < LEAST ? 1 : threads;
}

// Tasks

struct Parts {
  int64_t count, base, extra;
  Parts(int64_t total, int64_t parts) : count(parts), base(total / parts), extra(total % parts) {}
  int64_t begin(int64_t i) const { return i * base + std::min(i, extra); }
  int64_t size(int64_t i) const { return base + (i < extra); }
};

// How images, heads and chunks of queries are dealt out. Heads of an image lie beside one another in memory, so that
// one thread should have many of them.
class Tasks {
 public:
  Tasks(const Problem& p, int64_t image_parts, int64_t head_parts, int64_t chunks, int threads)
      : images_(p.batch, image_parts), heads_(p.heads, head_parts), chunks_(chunks), threads_(threads) {}

  int64_t count() const { return images_.count * heads_.count * chunks_; }
  int64_t chunks() const { return chunks_; }
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
            chunks_,
            ends ? -1 : heads_.begin(next / chunks_ % heads_.count),
            ends ? -1 : images_.begin(image_part(next))};
  }

 private:
  Parts images_, heads_;
  int64_t chunks_, threads_;
};

constexpr int64_t PER_THREAD = 4;  // tasks, so that threads end at about the same time

int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Heads of an image are dealt out only where there are few images for so many threads.
Tasks tasks_of_images(const Problem& p, int64_t chunks, int threads) {
  return {p, p.batch, std::clamp<int64_t>(PER_THREAD * threads / (p.batch * chunks), 1, p.heads), chunks, threads};
}

// With a bias that images share, a task has several images, for which the bias of its heads, at most `heads`, is
// transposed once: about `images`, or less, since there are to be `fewest` tasks, for which images are divided first,
// then heads; or more, since there are to be at most `most` parts of the images.
Tasks tasks_of_shared_bias(const Problem& p, int64_t heads, int64_t images, int64_t fewest, int64_t most,
                           int64_t chunks, int threads) {
  constexpr int64_t FEW_IMAGES = 4;
  const int64_t parts = divide(p.heads, heads);
  const int64_t image_parts = std::min(std::clamp(divide(fewest, parts * chunks), divide(p.batch, images),
                                                  divide(p.batch, std::min(images, FEW_IMAGES))),
                                       most);
  const int64_t head_parts = std::clamp(divide(fewest, image_parts * chunks), parts, p.heads);
  return {p, image_parts, head_parts, chunks, threads};
}

// Queries of a head are divided further, which costs a little, where threads would wait for one another since heads are
// few; not beside a shared bias, of which each task arranges that of all queries.
Tasks forward_tasks(const Forward& f, const Kernels& kernels, int threads) {
  if (!shares_bias(f)) {
    const int64_t heads = f.batch * f.heads;
    const int64_t fewest = threads > 1 && heads < 2 * threads ? divide(PER_THREAD * threads, heads) : 1;
    return tasks_of_images(f, kernels.forward_chunks(f, fewest), threads);
  }
  constexpr int64_t IMAGES = 8, MOST_PER_THREAD = 16;
  return tasks_of_shared_bias(f, heads_together(f, kernels.lanes), IMAGES, PER_THREAD * threads,
                              MOST_PER_THREAD * threads, kernels.forward_chunks(f, 1), threads);
}

// The gradient of such a bias is summed over the images of a task, in parts that follow from the shape alone.
Tasks backward_tasks(const Backward& b, int64_t lanes, int threads) {
  constexpr int64_t IMAGES = 16, FEWEST = 32, MOST_SUMS = 1 << 23;  // floats
  const bool sums_bias = b.grad_bias != nullptr;
  if (!shares_bias(b) || (sums_bias && b.bias_images != 1)) return tasks_of_images(b, 1, threads);
  const int64_t most = sums_bias ? std::max<int64_t>(MOST_SUMS / (shared_offsets(b, lanes) * b.heads), 1) : b.batch;
  return tasks_of_shared_bias(b, heads_together(b, lanes), IMAGES, FEWEST, most, 1, threads);
}

}  // namespace

const char* instruction_set(const std::string& wanted) { return choose(wanted).name; }

void forward(const Forward& f, const std::string& isa, int threads) {
  threads = threads_worth(f, threads);
  const Kernels& kernels = kernels_for(f.dtype, isa);
  const Floats head_share = allocate(f.batch * f.heads * head_sums(f) * f.queries + 1);
  const Tasks tasks = forward_tasks(f, kernels, threads);
  std::vector<int64_t> heads_left(static_cast<size_t>(f.batch), f.heads * tasks.chunks());
  run(tasks.count(), threads, kernels.forward_scratch(f), [&](int64_t task, float* scratch) {
    kernels.forward(f, tasks[task], heads_left.data(), head_share.get(), scratch);
  });
  if (f.sources > MAX_FUSED_SOURCES) {
    const int64_t label_chunks = kernels.dense_share_chunks(f);
    run(f.batch * label_chunks, threads, kernels.dense_share_scratch(f), [&](int64_t task, float* scratch) {
      kernels.dense_share(f, head_share.get(), task / label_chunks, task % label_chunks, scratch);
    });
  }
}

void backward(const Backward& b, const std::string& isa, int threads) {
  threads = threads_worth(b, threads);
  const Kernels& kernels = kernels_for(b.dtype, isa);
  const int64_t bias_sum = shared_offsets(b, kernels.lanes);
  const bool sums_bias = b.grad_bias != nullptr;
  const Tasks tasks = backward_tasks(b, kernels.lanes, threads);
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
    const int64_t vectors = padded_queries(b, kernels.lanes) / kernels.lanes;
    run(b.bias_images * b.bias_heads * vectors, threads, 0, [&](int64_t task, float*) {
      const int64_t vector = task % vectors, head = task / vectors % b.bias_heads,
                    image = task / vectors / b.bias_heads;
      kernels.sum_grad_bias(b, parts.get(), tasks.image_parts(), image, head, vector * kernels.lanes);
    });
  }
}

}  // namespace tlalign::cpu
