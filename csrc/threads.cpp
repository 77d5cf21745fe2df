// Threads: those of the OpenMP runtime in the process where there is one, else a small pool of our own.
//
// torch's OpenMP threads spin for a while after each of its operations. A second pool would share the cores with them
// and lose; so we look up the runtime that torch has loaded and run on its very threads. Nothing is linked: without
// torch, or with a torch that has no OpenMP, our own pool works.
#include "threads.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace loki {
namespace {

struct Round {
    Task task;
    void* context;
    int tasks, workers;
    std::atomic<int> next{0};

    void work(int worker) {
        for (int i = next.fetch_add(1, std::memory_order_relaxed); i < tasks;
             i = next.fetch_add(1, std::memory_order_relaxed))
            task(context, i, worker);
    }
};

// GOMP_parallel is part of GCC's stable ABI, which LLVM's and Intel's runtimes export too.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread)() = nullptr;

    static const OpenMP& found() {
        static const OpenMP runtime = [] {
            OpenMP r;
            r.parallel = reinterpret_cast<decltype(r.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
            r.thread = reinterpret_cast<decltype(r.thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
            return r;
        }();
        return runtime;
    }
    bool usable() const { return parallel && thread; }
};

// Workers spin for some microseconds, as the phases of one step follow each other closely, then sleep.
class Pool {
public:
    void run(Round& round) {
        std::lock_guard<std::mutex> one_at_a_time(turn_);
        grow(round.workers - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            round_ = &round;
            pending_.store(static_cast<int>(threads_.size()));
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        round.work(0);
        for (int i = 0; pending_.load(std::memory_order_acquire) > 0; i++)
            if (i > 200) std::this_thread::yield();
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

private:
    void grow(int wanted) {
        while (static_cast<int>(threads_.size()) < wanted) {
            int worker = static_cast<int>(threads_.size()) + 1;
            threads_.emplace_back([this, worker, seen = generation_.load()] { serve(worker, seen); });
        }
    }

    void serve(int worker, uint64_t seen) {
        while (true) {
            for (int i = 0; i < 4000 && generation_.load(std::memory_order_acquire) == seen; i++)
                std::atomic_signal_fence(std::memory_order_seq_cst);
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                seen = generation_.load();
                if (stop_) return;
            }
            if (worker < round_->workers) round_->work(worker);
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> pending_{0};
    Round* round_ = nullptr;
    bool stop_ = false;
};

std::atomic<bool> own_threads{false};

}  // namespace

bool shares_openmp() { return !own_threads.load() && OpenMP::found().usable(); }

void use_own_threads(bool own) { own_threads.store(own); }

void run_tasks(int tasks, int threads, Task task, void* context) {
    threads = std::min(threads, tasks);
    if (threads <= 1) {
        for (int i = 0; i < tasks; i++) task(context, i, 0);
        return;
    }
    Round round{task, context, tasks, threads};
    if (!shares_openmp()) {
        static Pool pool;
        pool.run(round);
        return;
    }
    OpenMP::found().parallel(
        [](void* data) { static_cast<Round*>(data)->work(OpenMP::found().thread()); }, &round,
        static_cast<unsigned>(threads), 0);
}

}  // namespace loki
