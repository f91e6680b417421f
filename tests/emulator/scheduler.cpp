// Threads of a kernel as fibers of one host thread: which of them runs next is drawn from the seed,
// at every wait and at any access. Blocks of a cooperative launch are all alive at once; others run
// one after another in an order of the seed.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cuda_runtime.h"
#include "launch_state.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace diffmic::emulator {

Config config;
Launch* launch = nullptr;
Thread* running = nullptr;
bool in_kernel = false;

namespace {

constexpr std::size_t kStack = 128 * 1024;
// Turns of spinning threads without any other's, after which nobody is expected to come.
constexpr long kPatience = 200000;

std::mt19937 random_source;
const std::function<void()>* body = nullptr;
Block* present = nullptr;  // whose shared memory is in place
long idle_spins = 0;

#if defined(__x86_64__)
// Saves what a call must keep, and continues at the other stack.
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
void* scheduler_stack = nullptr;
void ToScheduler() { diffmic_emulator_switch(&running->stack_pointer, scheduler_stack); }
void ToThread(Thread& thread) { diffmic_emulator_switch(&scheduler_stack, thread.stack_pointer); }
void Prepare(Thread& thread, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(thread.stack + kStack) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);  // where the first switch returns to
  thread.stack_pointer = top;
}
#else
ucontext_t scheduler_context;
std::vector<std::unique_ptr<ucontext_t>> contexts;
void ToScheduler() {
  swapcontext(static_cast<ucontext_t*>(running->stack_pointer), &scheduler_context);
}
void ToThread(Thread& thread) {
  swapcontext(&scheduler_context, static_cast<ucontext_t*>(thread.stack_pointer));
}
void Prepare(Thread& thread, void (*entry)()) {
  contexts.push_back(std::make_unique<ucontext_t>());
  ucontext_t* context = contexts.back().get();
  getcontext(context);
  context->uc_stack.ss_sp = thread.stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  thread.stack_pointer = context;
}
#endif

// Stacks are kept from launch to launch.
class Stacks {
 public:
  unsigned char* Take() {
    if (used_ == stacks_.size()) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back(static_cast<unsigned char*>(memory));
    }
    return stacks_[used_++];
  }
  void GiveBack() { used_ = 0; }

 private:
  std::vector<unsigned char*> stacks_;
  std::size_t used_ = 0;
} stacks;

unsigned Draw(std::size_t count) {
  return static_cast<unsigned>(random_source() % static_cast<std::uint32_t>(count));
}

void MakeReady(Thread& thread) {
  thread.waits = Waits::kNothing;
  thread.block->ready.push_back(thread.id);
}

void ReleaseBlock(Block& block) {
  block.arrived = 0;
  block.barrier_place = nullptr;
  JoinBlock(block);
  for (Thread& thread : block.threads) {
    if (thread.waits == Waits::kBlock) MakeReady(thread);
  }
}

void Wait(Waits what, const char* name, const void* place) {
  running->waits = what;
  running->waits_for = name;
  running->place = place;
  idle_spins = 0;
  ToScheduler();
}

void Main() {
  in_kernel = true;
  (*body)();
  in_kernel = false;
  Thread& self = *running;
  if (!self.open.empty() || !self.groups.empty()) {
    for (const auto& group : self.groups) {
      if (group.empty()) continue;
      Report("an asynchronous copy was never waited for", launch->kernel, "");
      break;
    }
    if (!self.open.empty()) {
      Report("an asynchronous copy was never committed", launch->kernel, "");
    }
  }
  Block& block = *self.block;
  self.waits = Waits::kDone;
  --block.alive;
  idle_spins = 0;
  if (block.arrived > 0) {
    Report("a barrier that a thread of the block has left without", block.barrier_place, "");
    if (block.arrived == block.alive) ReleaseBlock(block);
  }
  ToScheduler();
  __builtin_unreachable();
}

void SetUp(Block& block, unsigned number) {
  const Dim grid = launch->grid;
  const Dim dim = launch->dim;
  const unsigned count = dim.x * dim.y * dim.z;
  block.number = number;
  block.index[0] = number % grid.x;
  block.index[1] = number / grid.x % grid.y;
  block.index[2] = number / grid.x / grid.y;
  block.alive = count;
  block.meetings.resize((count + 31) / 32);
  block.results.assign(count * 32 * kSlot, 0);
  auto view = std::make_shared<View>();
  view->threads.assign(count, 0);
  block.threads.resize(count);
  for (unsigned id = 0; id < count; ++id) {
    Thread& thread = block.threads[id];
    thread.block = &block;
    thread.id = id;
    thread.index[0] = id % dim.x;
    thread.index[1] = id / dim.x % dim.y;
    thread.index[2] = id / dim.x / dim.y;
    thread.view = view;
    thread.stack = stacks.Take();
    Prepare(thread, &Main);
    block.ready.push_back(id);
  }
}

// The parts of thread-local memory that the launch may use: static variables, dynamic memory.
std::size_t SharedBytes() {
  const SharedMemory& memory = Shared();
  return static_cast<std::size_t>(memory.dynamic - memory.begin) +
         static_cast<std::size_t>(memory.end - memory.dynamic_end) + launch->shared;
}

void CopyShared(std::vector<unsigned char>* data, bool out) {
  const SharedMemory& memory = Shared();
  data->resize(SharedBytes());
  unsigned char* place = data->data();
  const auto part = [&](unsigned char* at, std::size_t size) {
    out ? std::memcpy(place, at, size) : std::memcpy(at, place, size);
    place += size;
  };
  part(memory.begin, static_cast<std::size_t>(memory.dynamic - memory.begin));
  part(memory.dynamic, launch->shared);
  part(memory.dynamic_end, static_cast<std::size_t>(memory.end - memory.dynamic_end));
}

// Shared memory begins as not-a-numbers, whatever was left there.
void PlaceShared(Block& block) {
  if (present == &block) return;
  SwapSharedShadow(present, &block);
  if (present != nullptr) CopyShared(&present->shared, true);
  if (block.shared.empty()) block.shared.assign(SharedBytes(), 0xFF);
  CopyShared(&block.shared, false);
  present = &block;
}

std::string Stuck(const std::vector<Block*>& blocks) {
  std::string text;
  int told = 0;
  for (const Block* block : blocks) {
    for (const Thread& thread : block->threads) {
      if (thread.waits == Waits::kDone || ++told > 4) continue;
      text += "\n    " + InWords(thread) + " waits for " +
              (thread.spinning ? "another block" : thread.waits_for) + " at " +
              PlaceOf(thread.place);
    }
  }
  if (told > 4) text += "\n    and " + std::to_string(told - 4) + " more";
  return text;
}

void RunBlocks(const std::vector<Block*>& blocks) {
  std::vector<Block*> awake;
  while (!launch->aborted) {
    awake.clear();
    bool alive = false;
    for (Block* block : blocks) {
      alive = alive || block->alive > 0;
      if (!block->ready.empty()) awake.push_back(block);
    }
    if (!alive) return;
    if (awake.empty() || idle_spins > kPatience) {
      running = nullptr;
      Report("deadlock", launch->kernel, Stuck(blocks));
      launch->aborted = true;
      return;
    }
    // Shared memory has to be exchanged with the block, so a block keeps its turn for a while.
    Block& block = *awake[Draw(awake.size())];
    PlaceShared(block);
    for (int turns = 0; turns < 400 && !block.ready.empty() && !launch->aborted; ++turns) {
      const unsigned which = Draw(block.ready.size());
      Thread& thread = block.threads[block.ready[which]];
      block.ready[which] = block.ready.back();
      block.ready.pop_back();
      threadIdx = {thread.index[0], thread.index[1], thread.index[2]};
      blockIdx = {block.index[0], block.index[1], block.index[2]};
      running = &thread;
      thread.spinning = false;
      ToThread(thread);
      if (thread.spinning && Draw(2) == 0 && awake.size() > 1) break;
    }
  }
}

}  // namespace

std::mt19937& Random() { return random_source; }

void Yield() {
  running->block->ready.push_back(running->id);
  ToScheduler();
}

void AbortThread() {
  launch->aborted = true;
  ToScheduler();
  __builtin_unreachable();
}

void Run(const void* kernel, Dim grid, Dim dim, std::size_t shared, bool cooperative,
         const std::function<void()>& what) {
  Launch state{kernel, grid, dim, shared, cooperative, {}, {}, 0, false};
  const unsigned blocks = grid.x * grid.y * grid.z;
  const unsigned threads = dim.x * dim.y * dim.z;
  if (threads == 0 || threads > 1024 ||
      shared > static_cast<std::size_t>(config.shared_per_block) || grid.y > 65535 ||
      grid.z > 65535) {
    throw Fault(NameOf(kernel) + ": no GPU takes a launch of " + std::to_string(threads) +
                " threads and " + std::to_string(shared) + " bytes of shared memory a block");
  }
  if (cooperative && blocks > static_cast<unsigned>(config.multiprocessors) *
                                  static_cast<unsigned>(std::max<std::size_t>(
                                      1, config.shared_per_multiprocessor / (shared + 1024)))) {
    throw Fault(NameOf(kernel) + ": a cooperative launch of more blocks than can be resident");
  }
  launch = &state;
  body = &what;
  random_source.seed(config.seed);
  blockDim = dim3(dim.x, dim.y, dim.z);
  gridDim = dim3(grid.x, grid.y, grid.z);
  idle_spins = 0;
  present = nullptr;
  state.blocks.resize(blocks);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_source);
  BeginShadow();
  // The module's thread-local variables that are no kernel's lie there as well.
  std::vector<unsigned char> host;
  CopyShared(&host, true);
  const std::size_t together = cooperative ? order.size() : 1;
  for (std::size_t first = 0; first < order.size() && !state.aborted; first += together) {
    stacks.GiveBack();
    std::vector<Block*> alive;
    for (std::size_t i = first; i < first + together; ++i) {
      Block& block = state.blocks[order[i]];
      SetUp(block, order[i]);
      ResetSharedShadow(block);
      alive.push_back(&block);
    }
    present = nullptr;
    RunBlocks(alive);
    for (Block* block : alive) {
      SumTraffic(*block);
      const std::vector<ViewPointer> released = std::move(block->released);
      const unsigned number = block->number;
      *block = Block{};
      block->number = number;
      block->released = released;
    }
  }
  running = nullptr;
  CopyShared(&host, false);
  EndTraffic();
  EndShadow();
  ForgetOrder();
  launch = nullptr;
#if !defined(__x86_64__)
  contexts.clear();
#endif
  if (state.faults.empty()) return;
  std::string text = NameOf(kernel) + ":";
  for (const std::string& fault : state.faults) text += "\n  " + fault;
  if (state.more_faults > 0) text += "\n  and " + std::to_string(state.more_faults) + " more";
  throw Fault(text);
}

unsigned Lane() { return running->id % 32; }

void BlockBarrier() {
  const OwnAccount own;
  const void* place = __builtin_return_address(0);
  Block& block = *running->block;
  CountBarrier();
  if (block.barrier_place != nullptr && block.barrier_place != place) {
    Report("threads of a block meet at different barriers", place,
           ", the others at " + PlaceOf(block.barrier_place));
  }
  block.barrier_place = place;
  ++block.arrived;
  if (block.alive < block.threads.size()) {
    Report("a barrier that a thread of the block has left without", place, "");
  }
  if (block.arrived == block.alive) {
    running->waits = Waits::kBlock;
    ReleaseBlock(block);
    ToScheduler();
    return;
  }
  Wait(Waits::kBlock, "the barrier of its block", place);
}

void WarpBarrier(std::uint32_t mask) {
  Exchange(mask, "__syncwarp", nullptr, 0, __builtin_return_address(0));
}

const unsigned char* Exchange(std::uint32_t mask, const char* operation, const void* value,
                              std::size_t size, const void* place) {
  const OwnAccount own;
  Thread& self = *running;
  Block& block = *self.block;
  const unsigned warp = self.id / 32;
  const unsigned lane = Lane();
  if ((mask >> lane & 1) == 0) {
    Report("a lane is not in the mask that it exchanges with", place, "");
    AbortThread();
  }
  auto& pending = block.meetings[warp];
  Meeting* meeting = nullptr;
  for (auto& other : pending) {
    if ((other->mask & mask) == 0) continue;
    if (other->mask != mask || std::strcmp(other->operation, operation) != 0 ||
        other->size != size || (other->arrived >> lane & 1)) {
      Report("lanes of a warp meet at different exchanges", place,
             std::string(", ") + operation + ", the others at " + other->operation + " at " +
                 PlaceOf(other->place));
      AbortThread();
    }
    meeting = other.get();
  }
  if (meeting == nullptr) {
    pending.push_back(std::make_unique<Meeting>());
    meeting = pending.back().get();
    meeting->mask = mask;
    meeting->operation = operation;
    meeting->place = place;
    meeting->size = size;
    // Lanes outside of the mask give nothing that could be meant.
    std::memset(meeting->values, 0xFF, sizeof meeting->values);
  }
  if (size > 0) std::memcpy(meeting->values + kSlot * lane, value, size);
  meeting->arrived |= 1u << lane;
  unsigned char* results = block.results.data() + std::size_t{self.id} * 32 * kSlot;
  if (meeting->arrived != mask) {
    Wait(Waits::kWarp, operation, place);
    return results;
  }
  if (std::strcmp(operation, "__syncwarp") == 0) JoinWarp(block, warp, mask);
  for (unsigned other = 0; other < 32; ++other) {
    if ((mask >> other & 1) == 0) continue;
    Thread& thread = block.threads[warp * 32 + other];
    if (size > 0) {
      std::memcpy(block.results.data() + std::size_t{thread.id} * 32 * kSlot, meeting->values,
                  sizeof meeting->values);
    }
    if (&thread != &self) MakeReady(thread);
  }
  std::erase_if(pending, [&](const auto& each) { return each.get() == meeting; });
  if (Draw(4) == 0) Yield();
  return results;
}

void SpinPause() {
  const OwnAccount own;
  running->spinning = true;
  running->place = __builtin_return_address(0);
  ++idle_spins;
  Yield();
}

void CopyAsync(void* shared, const void* global, std::size_t size) {
  const OwnAccount own;
  const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global),
                  size};
  OnCopyIssued(copy, __builtin_return_address(0));
  std::memset(shared, 0xFF, size);  // until it is waited for, nothing is there
  running->open.push_back(copy);
}

void CommitCopies() {
  const OwnAccount own;
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void WaitCopies(unsigned left) {
  const OwnAccount own;
  auto& groups = running->groups;
  while (groups.size() > left) {
    for (const Copy& copy : groups.front()) {
      OnCopyDelivered(copy);
      std::memcpy(copy.to, copy.from, copy.size);
    }
    groups.pop_front();
  }
}

}  // namespace diffmic::emulator
