// Runs the threads of a kernel as fibers of one host thread. The next one is drawn at random from
// the seed, at every wait and possibly at any access. Blocks of a cooperative launch are all
// resident; others run one after another in random order.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>

#include "cuda_runtime.h"
#include "fibers.h"
#include "launch_state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace diffmic::emulator {

Config config;
Launch* launch = nullptr;
Thread* running = nullptr;
bool in_kernel = false;

namespace {

// Polls without any progress after which a deadlock is reported.
constexpr long kPatience = 50000;

std::mt19937 random_source;
const std::function<void()>* body = nullptr;
Block* present = nullptr;  // the block whose shared memory is loaded

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
  launch->idle_spins = 0;
  if (block.arrived > 0) {
    Report("a barrier after a thread of the block has exited", block.barrier_place, "");
    if (block.arrived == block.alive) ReleaseBlock(block);
  }
  SwitchBack();
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
  block.results.assign(count * 32 * kMostExchanged, 0);
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
    thread.stack = TakeStack();
    Prepare(thread, &Main);
    block.ready.push_back(id);
  }
}

// The parts of thread-local memory that the launch uses: static variables and dynamic memory.
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

// Loads the shared memory of a block, which is initialised with NaN.
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
              (thread.waits == Waits::kNothing ? "another block" : thread.waits_for) + " at " +
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
    if (awake.empty() || launch->idle_spins > kPatience) {
      running = nullptr;
      Report("deadlock", launch->kernel, Stuck(blocks));
      launch->aborted = true;
      return;
    }
    // A switch of blocks copies shared memory, so a block runs for several turns.
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
      SwitchTo(thread);
      if (thread.spinning && Draw(2) == 0 && awake.size() > 1) break;
    }
  }
}

}  // namespace

std::mt19937& Random() { return random_source; }

unsigned Draw(std::size_t count) {
  return static_cast<unsigned>(random_source() % static_cast<std::uint32_t>(count));
}

void MakeReady(Thread& thread) {
  thread.waits = Waits::kNothing;
  thread.block->ready.push_back(thread.id);
}

void Yield() {
  running->block->ready.push_back(running->id);
  SwitchBack();
}

void AbortThread() {
  launch->aborted = true;
  SwitchBack();
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
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  launch = &state;
  body = &what;
  random_source.seed(config.seed);
  blockDim = dim3(dim.x, dim.y, dim.z);
  gridDim = dim3(grid.x, grid.y, grid.z);
  present = nullptr;
  state.blocks.resize(blocks);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_source);
  BeginShadow();
  // This memory also contains the module's other thread-local variables.
  std::vector<unsigned char> host;
  CopyShared(&host, true);
  const std::size_t together = cooperative ? order.size() : 1;
  for (std::size_t first = 0; first < order.size() && !state.aborted; first += together) {
    GiveBackStacks();
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
  if (state.faults.empty()) return;
  std::string text = NameOf(kernel) + ":";
  for (const std::string& fault : state.faults) text += "\n  " + fault;
  if (state.more_faults > 0) text += "\n  and " + std::to_string(state.more_faults) + " more";
  throw Fault(text);
}

}  // namespace diffmic::emulator
