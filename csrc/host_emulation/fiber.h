// Threads of execution that hand over to each other by hand: each CUDA thread is one.
//
// The stacks are of one pool, made once, each with a page below it that must not be touched, and
// under AddressSanitizer with the frames that it keeps elsewhere.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) || defined(SEQKERNELS_PORTABLE_FIBERS)
#include <ucontext.h>
#endif

namespace seqkernels::host_emulation {

class StackPool {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBytes = 512 * 1024;  // frames hold red zones
#else
  static constexpr size_t kBytes = 128 * 1024;
#endif

  struct Stack {
    unsigned char* bottom;
    void* fake = nullptr;
  };

  static Stack& stack(size_t index) {
    static std::deque<Stack> stacks;
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    while (stacks.size() <= index) {
      void* p = mmap(nullptr, guard + kBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      mprotect(p, guard, PROT_NONE);
      stacks.push_back({static_cast<unsigned char*>(p) + guard});
    }
    return stacks[index];
  }
};

#if defined(__x86_64__) && !defined(SEQKERNELS_PORTABLE_FIBERS)

// Saves the registers that a call preserves and the stack, and takes over another's.
__attribute__((naked, noipa)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

class Context {
 public:
  void prepare(unsigned char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + StackPool::kBytes);
    *--top = nullptr;  // where `entry` would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
  }
  void leave_for(Context& to) { switch_stack(&pointer_, to.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(unsigned char* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = StackPool::kBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void leave_for(Context& to) { swapcontext(&context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

// Runs on the stack of its index, started and resumed by the main thread alone.
class Fiber {
 public:
  // `entry` calls `started` first and `pause` last.
  void start(size_t index, void (*entry)()) {
    stack_ = &StackPool::stack(index);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_->bottom, StackPool::kBytes);
#endif
    own_.prepare(stack_->bottom, entry);
  }

  // Called by the main thread.
  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_->bottom, StackPool::kBytes);
#endif
    main_.leave_for(own_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Called on the fiber.
  void started() { arrive(); }
  void pause() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&stack_->fake, main_stack_, main_bytes_);
#endif
    own_.leave_for(main_);
    arrive();
  }

 private:
  void arrive() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(stack_->fake, &main_stack_, &main_bytes_);
#endif
  }

  static inline Context main_;
  Context own_;
  StackPool::Stack* stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack_ = nullptr;
  size_t main_bytes_ = 0;
#endif
};

}  // namespace seqkernels::host_emulation
