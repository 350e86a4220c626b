#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, gridDim;

namespace emulated {

unsigned char* shared;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  bool wanted;
};

struct Fiber {
  ucontext_t context;
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStack);
  dim3 index;
  bool ready, done;
  std::vector<std::vector<Copy>> groups;  // of copies; the last one is open
};

struct Warp {
  const char* kind;
  int arrived, turn;
  unsigned char operands[2][kWarp * kOperand];
};

[[noreturn]] void stop(const char* why) {
  std::fprintf(stderr, "emulated GPU: %s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
  std::abort();
}

std::vector<Fiber> fibers;
std::vector<Warp> warps;
const std::function<void()>* kernel;
ucontext_t scheduler;
int current, threads, waiting, finished;
bool backwards_first;  // changes with every kernel, so that kernels of one block have both orders

void enter() {
  (*kernel)();
  Fiber& mine = fibers[current];
  for (const auto& group : mine.groups)
    if (!group.empty()) stop("ends with copies under way");
  mine.done = true;
  ++finished;
  swapcontext(&mine.context, &scheduler);
}

void yield() { swapcontext(&fibers[current].context, &scheduler); }

void release(int first, int count) {
  for (int i = first; i < first + count; ++i) fibers[i].ready = true;
}

void start(const cudaLaunchConfig_t& config) {
  const unsigned width = config.blockDim.x;
  threads = static_cast<int>(width * config.blockDim.y);
  if (threads % kWarp) stop("blocks of whole warps expected");
  if (static_cast<int>(fibers.size()) < threads) fibers.resize(threads);
  warps.assign(threads / kWarp, Warp{});
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = dim3(i % width, i / width);
    fiber.ready = true;
    fiber.done = false;
    fiber.groups.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  waiting = finished = 0;
}

// One warp after the other and one lane after the other, in another order in each block.
void run_block() {
  const int count = threads / kWarp, turned = static_cast<int>(blockIdx.x) % count;
  while (finished < threads) {
    bool any = false;
    for (int w = 0; w < count; ++w)
      for (int l = 0; l < kWarp; ++l) {
        const bool forwards = blockIdx.x % 2 == backwards_first;
        const int warp = ((forwards ? w : count - 1 - w) + turned) % count;
        const int i = warp * kWarp + (forwards ? l : kWarp - 1 - l);
        if (fibers[i].done || !fibers[i].ready) continue;
        any = true;
        current = i;
        threadIdx = fibers[i].index;
        swapcontext(&scheduler, &fibers[i].context);
      }
    if (!any) stop("lanes wait for lanes that do not come");
  }
}

}  // namespace

void run(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (config.dynamicSmemBytes > kMostShared) stop("more shared memory than a block may have");
  gridDim = config.gridDim;
  kernel = &body;
  backwards_first = !backwards_first;
  for (unsigned x = 0; x < gridDim.x; ++x) {
    blockIdx = dim3(x);
    std::vector<unsigned char> memory(config.dynamicSmemBytes + 128, 0xff);  // not numbers
    shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
    start(config);
    run_block();
  }
}

int lane() { return current % kWarp; }

const unsigned char* meet(const char* kind, const void* operand, size_t bytes) {
  const int me = current;
  Warp& warp = warps[me / kWarp];
  unsigned char* operands = warp.operands[warp.turn];
  if (bytes) std::memcpy(operands + lane() * kOperand, operand, bytes);
  if (warp.arrived == 0) warp.kind = kind;
  if (std::strcmp(warp.kind, kind)) stop("lanes of a warp are at different instructions");
  fibers[me].ready = false;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    warp.turn ^= 1;  // the next instruction's operands leave these alone
    release(me / kWarp * kWarp, kWarp);
  } else {
    yield();
  }
  return operands;
}

void block_barrier() {
  fibers[current].ready = false;
  if (++waiting == threads - finished) {
    waiting = 0;
    release(0, threads);
  } else {
    yield();
  }
}

void copy_later(void* to, const void* from, bool wanted) { fibers[current].groups.back().push_back({to, from, wanted}); }

void close_copies() { fibers[current].groups.emplace_back(); }

void wait_for_copies(int open) {
  auto& groups = fibers[current].groups;
  while (static_cast<int>(groups.size()) > open + 1) {
    for (const Copy& copy : groups.front()) {
      if (copy.wanted)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulated
