// Work that XLA's own threads share.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace pjax {

// Items [0, size), taken in turn. Each thread that takes part has a function of its own, by make(), with scratch memory in it. One that
// comes late finds nothing left and touches no buffer.
struct Job {
  Job(int64_t s, std::function<std::function<void(int64_t)>()> m) : size(s), make(std::move(m)) {}

  void Drain() {
    int64_t item = next.fetch_add(1);
    if (item >= size) return;
    auto run = make();
    for (; item < size; item = next.fetch_add(1)) {
      run(item);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  // Whether no item is left to take.
  bool IsTaken() const { return next.load(std::memory_order_relaxed) >= size; }

  const int64_t size;
  const std::function<std::function<void(int64_t)>()> make;
  std::atomic<int64_t> next{0}, done{0};
};

// Waking a thread takes as long as a small product (40 µs), and a decode step has a hundred of them. So helpers look for the next job
// for a while before they go back to the pool.
class Helpers {
 public:
  static Helpers& Get() {
    static Helpers* helpers = new Helpers;  // never destroyed: threads may outlive the library's statics
    return *helpers;
  }

  void Share(xla::ffi::ThreadPool& pool, std::shared_ptr<Job> job) {
    const int64_t wanted = std::min<int64_t>(pool.num_threads(), job->size) - 1;
    if (wanted > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        newest_ = job;
      }
      posted_.fetch_add(1, std::memory_order_release);
      for (int64_t i = waiting_.load() + called_.load(); i < wanted; ++i) {
        called_.fetch_add(1);
        pool.Schedule([this, job] {
          called_.fetch_sub(1);
          if (auto one = job->IsTaken() ? Newest() : job; !one->IsTaken()) Help(one);
        });
      }
    }
    job->Drain();
    while (job->done.load(std::memory_order_acquire) < job->size) std::this_thread::yield();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds kPatience{100};
  static constexpr std::chrono::microseconds kShort{2000};  // after longer jobs a thread that has to be woken is no loss

  void Help(std::shared_ptr<Job> job) {
    while (job != nullptr) {
      const auto seen = posted_.load(std::memory_order_acquire);
      const auto started = Clock::now();
      job->Drain();
      job = Clock::now() - started < kShort ? Next(seen) : nullptr;
    }
  }

  // The next job after number `seen`, or null when none comes for a while.
  std::shared_ptr<Job> Next(uint64_t seen) {
    waiting_.fetch_add(1);
    const auto until = Clock::now() + kPatience;
    while (posted_.load(std::memory_order_acquire) == seen && Clock::now() < until) std::this_thread::yield();
    waiting_.fetch_sub(1);
    return posted_.load(std::memory_order_acquire) == seen ? nullptr : Newest();
  }

  std::shared_ptr<Job> Newest() {
    std::lock_guard<std::mutex> lock(mutex_);
    return newest_;
  }

  std::mutex mutex_;
  std::shared_ptr<Job> newest_;
  std::atomic<uint64_t> posted_{0};
  std::atomic<int64_t> waiting_{0}, called_{0};  // helpers that look for a job, and that the pool has not begun
};

// Calls run(item) for each item in [0, size), in the calling thread and in the pool's. Each thread makes its own `run` by make().
template <typename Make>
void Share(xla::ffi::ThreadPool& pool, int64_t size, Make make) {
  Helpers::Get().Share(pool, std::make_shared<Job>(size, std::move(make)));
}

}  // namespace pjax
