// Threads of the native core where the system has none to give, or no memory: what can run does,
// and the rest is an exception in the caller.
//
// The program stands between the core and the system: pthread_create, aligned_alloc and operator
// new fail when a test says so.
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/parallel.h"
#include "encoder_problem.h"
#include "encoder_verdicts.h"
#include "seqkernels/linear.h"
#include "seqkernels/processor.h"

namespace {

constexpr int kNever = 1 << 30;
// How many calls succeed before one fails; those after it succeed again, but threads, of which the
// system has no more.
std::atomic<int> threads_left{kNever}, workspaces_left{kNever}, news_left{kNever};

}  // namespace

// Visible, so that the C++ runtime, a shared library, calls this one.
extern "C" [[gnu::visibility("default")]] int pthread_create(pthread_t* thread,
                                                             const pthread_attr_t* attributes,
                                                             void* (*start)(void*),
                                                             void* argument) noexcept {
  static const auto real =
      reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  if (threads_left.fetch_sub(1) <= 0) return EAGAIN;
  return real(thread, attributes, start, argument);
}

extern "C" void* aligned_alloc(size_t alignment, size_t bytes) noexcept {
  static const auto real =
      reinterpret_cast<decltype(&aligned_alloc)>(dlsym(RTLD_NEXT, "aligned_alloc"));
  if (workspaces_left.fetch_sub(1) == 0) return nullptr;
  return real(alignment, bytes);
}

void* operator new(size_t bytes) {
  void* memory = news_left.fetch_sub(1) == 0 ? nullptr : std::malloc(bytes);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

namespace seqkernels::test {
namespace {

using cpu::Barrier;

// What `size` bodies saw that meet at barriers again and again.
struct Meeting {
  static constexpr int kRounds = 50;
  Barrier barrier;
  std::atomic<int> bodies{0}, arrived{0}, wrong{0};
  std::atomic<unsigned> ranks{0};
  std::atomic<int> size{0};

  static void body(void* context, int rank, int size) {
    Meeting& m = *static_cast<Meeting*>(context);
    ++m.bodies;
    m.ranks |= 1u << rank;
    m.size = size;
    for (int round = 0; round < kRounds; ++round) {
      ++m.arrived;
      m.barrier.wait(size);
      if (m.arrived != size * (round + 1)) ++m.wrong;
      m.barrier.wait(size);
    }
  }
};

void check_meeting(Verdicts& v, int asked, int expected, const std::string& what) {
  Meeting m;
  cpu::run_parallel(asked, &Meeting::body, &m);
  v.check(m.size == expected && m.bodies == expected, what + ": " + std::to_string(m.bodies) +
                                                          " bodies of " + std::to_string(m.size) +
                                                          ", expected " + std::to_string(expected));
  v.check(m.ranks == (1u << expected) - 1, what + ": a rank is missing or there twice");
  v.check(m.wrong == 0, what + ": a barrier let somebody through too early");
}

void whole_teams(Verdicts& v) {
  for (int threads : {1, 2, 3, 7}) check_meeting(v, threads, threads, "whole team");
}

// As many as start work together, and their barriers count on no one else.
void threads_that_do_not_start(Verdicts& v) {
  for (int left = 0; left < 5; ++left) {
    threads_left = left;
    check_meeting(v, 5, 1 + left, std::to_string(left) + " threads start");
    threads_left = kNever;
  }
  // The list of threads and the state of each thread come from operator new.
  for (int left = 0; left < 12; ++left) {
    Meeting m;
    news_left = left;
    cpu::run_parallel(5, &Meeting::body, &m);
    news_left = kNever;
    v.check(m.bodies == m.size && m.size >= 1, "no memory to start a thread");
  }
}

void bodies_that_throw(Verdicts& v) {
  struct Throwing {
    unsigned ranks;
    std::atomic<int> done{0};
    static void body(void* context, int rank, int) {
      Throwing& t = *static_cast<Throwing*>(context);
      if (t.ranks >> rank & 1) throw std::runtime_error("rank " + std::to_string(rank));
      ++t.done;
    }
  };
  for (unsigned ranks : {1u, 2u, 8u, 5u, 15u}) {
    Throwing t{ranks, {}};
    std::string caught;
    try {
      cpu::run_parallel(4, &Throwing::body, &t);
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    v.check(caught.rfind("rank ", 0) == 0, "a body's exception is thrown in the caller");
    v.check(t.done == 4 - __builtin_popcount(ranks), "the other bodies run to their end");
  }
}

// `call` with the k-th workspace refused throws std::bad_alloc, and works again afterwards. A
// thread keeps its workspace, so that the caller needs a new one only as a new thread.
void check_starving(Verdicts& v, const std::string& what, const std::function<void()>& call) {
  const auto anew = [&](int left) {
    bool starved = false;
    std::thread([&] {
      workspaces_left = left;
      try {
        call();
      } catch (const std::bad_alloc&) {
        starved = true;
      }
    }).join();
    const bool refused = workspaces_left < 0;
    workspaces_left = kNever;
    v.check(starved == refused, what + ": workspace " + std::to_string(left) +
                                    (refused ? " refused without an exception" : " not refused"));
    return refused;
  };
  int refused = 0;
  while (anew(refused)) ++refused;
  v.check(refused > 0, what + ": no workspace was asked for");
}

void workspaces_that_are_refused(Verdicts& v) {
  Case c;
  c.length = 100;
  for (int64_t batch : {1, 3, 40}) {  // a team on each sequence, or a sequence for each thread
    c.batch = batch;
    const Problem p(c);
    const Encoder encoder("portable", p.shape(), p.parameters());
    Run run;
    run.threads = 3;
    const std::vector<float> expected = forward(encoder, p, run);
    const std::string what = "encoder, batch " + std::to_string(batch);
    check_starving(v, what, [&] { v.same_bits(forward(encoder, p, run), expected, what); });
  }
  c.batch = 2;
  c.fusion = Fusion::kConcat;
  c.candidate_dim = 32;
  Problem users(c);
  std::vector<int64_t> index(40);
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i % 2);
  const Problem repeated = users.repeated(index);
  const Encoder encoder("portable", users.shape(), users.parameters());
  Run run;
  run.threads = 3;
  check_starving(v, "request", [&] { score_request(encoder, users, repeated, index, run); });

  constexpr int64_t kRows = 300, kWidth = 256;
  const std::vector<float> x(kRows * kWidth, 0.5f), weight(kWidth * kWidth, 0.25f);
  std::vector<float> out(kRows * kWidth);
  LinearShape shape;
  shape.in_features = shape.out_features = kWidth;
  LinearParameters parameters;
  parameters.weight = weight.data();
  const Linear linear("portable", shape, parameters);
  check_starving(v, "linear", [&] {
    LinearCall call;
    call.x = x.data();
    call.out = out.data();
    call.rows = kRows;
    call.x_stride = call.out_stride = kWidth;
    call.num_threads = 3;
    linear.forward(call);
  });
}

// A thread frees the workspace of a large request after enough small requests, and no sooner.
void workspaces_shrink(Verdicts& v) {
  constexpr size_t kLarge = size_t{16} << 20, kSmall = 4096;
  const auto held = [](size_t bytes) { return malloc_usable_size(cpu::thread_workspace(bytes)); };
  v.check(held(kLarge) >= kLarge, "workspace: less than was asked for");
  for (int i = 0; i < 1000; ++i) held(kSmall);
  v.check(held(kSmall) >= kLarge, "workspace: given back too early");
  for (int i = 0; i < 30; ++i) held(2 * kSmall);
  const size_t left = held(kSmall);
  v.check(left >= 2 * kSmall && left < kLarge / 8, "workspace: not given back");
  for (int i = 0; i < 5000; ++i) {
    held(kSmall);
    if (i % 1000 == 0) held(kLarge);
  }
  v.check(held(kSmall) >= kLarge, "workspace: given back although it is in use");
}

int run() {
  Verdicts v;
  workspaces_shrink(v);
  whole_teams(v);
  threads_that_do_not_start(v);
  bodies_that_throw(v);
  workspaces_that_are_refused(v);
  std::printf("%d checks, %d failures\n", v.checks(), v.failures());
  return v.failures() ? 1 : 0;
}

}  // namespace
}  // namespace seqkernels::test

int main(int argc, char**) {
  return argc > 1 ? 2 : seqkernels::test::run();  // it takes no arguments
}
