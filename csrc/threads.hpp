// Runs numbered tasks on several threads and waits for them.
#pragma once

namespace loki {

using Task = void (*)(void* context, int task, int worker);

// Calls task(context, i, worker) for every i < tasks, workers numbered below `threads`. Tasks go out in order, one by one.
void run_tasks(int tasks, int threads, Task task, void* context);

// Whether tasks run on the OpenMP runtime that the process already has; else on threads of our own.
bool shares_openmp();

// For tests: never look for an OpenMP runtime.
void use_own_threads(bool own);

template <typename Body>
void parallel(int tasks, int threads, Body& body) {
    run_tasks(tasks, threads, [](void* context, int task, int worker) { (*static_cast<Body*>(context))(task, worker); },
              &body);
}

}  // namespace loki
